import django.contrib.postgres.fields
import django.db.models.deletion
import django.utils.timezone
from django.contrib.postgres.operations import AddIndexConcurrently
from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("shop", "0015_unique")]
    operations = [
        migrations.AddField("article", "data", models.JSONField(default=dict)),
        migrations.AddField("article", "sizes", django.contrib.postgres.fields.ArrayField(base_field=models.IntegerField(), default=list, size=None)),
        migrations.AddField("article", "obsolete", models.CharField(default="x", max_length=5)),
    ]
