import django.contrib.postgres.fields
import django.db.models.deletion
import django.utils.timezone
from django.contrib.postgres.operations import AddIndexConcurrently
from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("shop", "0007_rename_name")]
    operations = [
        migrations.RenameModel("Product", "Article"),
        migrations.AlterField("article", "title", models.TextField()),
    ]
