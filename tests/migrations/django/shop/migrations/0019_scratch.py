import django.contrib.postgres.fields
import django.db.models.deletion
import django.utils.timezone
from django.contrib.postgres.operations import AddIndexConcurrently
from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("shop", "0018_tagged")]
    operations = [
        migrations.RemoveField("article", "obsolete"),
        migrations.CreateModel(
            name="Scratch",
            fields=[("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False)), ("text", models.TextField())],
        ),
    ]
