import django.contrib.postgres.fields
import django.db.models.deletion
import django.utils.timezone
from django.contrib.postgres.operations import AddIndexConcurrently
from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("shop", "0012_index_concurrently")]
    operations = [
        migrations.AddField("customer", "points", models.BigIntegerField(db_default=0, default=0)),
        migrations.AddConstraint("customer", models.CheckConstraint(condition=models.Q(("points__gte", 0)), name="points_not_negative")),
    ]
