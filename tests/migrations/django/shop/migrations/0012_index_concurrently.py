import django.contrib.postgres.fields
import django.db.models.deletion
import django.utils.timezone
from django.contrib.postgres.operations import AddIndexConcurrently
from django.db import migrations, models


class Migration(migrations.Migration):
    atomic = False
    dependencies = [("shop", "0011_state")]
    operations = [
        AddIndexConcurrently("customer", models.Index(fields=["full_name"], name="customer_by_name")),
    ]
