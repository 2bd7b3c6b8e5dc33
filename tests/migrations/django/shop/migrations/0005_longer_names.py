import django.contrib.postgres.fields
import django.db.models.deletion
import django.utils.timezone
from django.contrib.postgres.operations import AddIndexConcurrently
from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("shop", "0004_rows")]
    operations = [
        migrations.AlterField("customer", "name", models.CharField(max_length=200)),
        migrations.AlterField("customer", "email", models.EmailField(max_length=254, null=True, unique=True)),
    ]
