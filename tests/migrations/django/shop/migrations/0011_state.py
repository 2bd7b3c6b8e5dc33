import django.contrib.postgres.fields
import django.db.models.deletion
import django.utils.timezone
from django.contrib.postgres.operations import AddIndexConcurrently
from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("shop", "0010_orders")]
    operations = [
        migrations.AddField("order", "state", models.CharField(db_index=True, default="new", max_length=20)),
        migrations.AddField("line", "note", models.TextField(blank=True, default="")),
        migrations.AlterField("line", "quantity", models.SmallIntegerField(default=1)),
    ]
