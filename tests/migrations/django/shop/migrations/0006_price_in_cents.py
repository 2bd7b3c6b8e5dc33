import django.contrib.postgres.fields
import django.db.models.deletion
import django.utils.timezone
from django.contrib.postgres.operations import AddIndexConcurrently
from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("shop", "0005_longer_names")]
    operations = [
        migrations.AlterField("product", "price", models.DecimalField(decimal_places=2, default="0.00", max_digits=12)),
    ]
