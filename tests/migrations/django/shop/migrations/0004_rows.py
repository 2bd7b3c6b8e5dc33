import django.contrib.postgres.fields
import django.db.models.deletion
import django.utils.timezone
from django.contrib.postgres.operations import AddIndexConcurrently
from django.db import migrations, models


def fill(apps, schema_editor):
    customer = apps.get_model("shop", "Customer")
    customer.objects.bulk_create(customer(name=f"customer {n}", email=f"{n}@example.org") for n in range(200))
    product = apps.get_model("shop", "Product")
    product.objects.bulk_create(product(title=f"product {n}", price=n) for n in range(50))
    customer.objects.filter(name__endswith="7").update(active=False)


class Migration(migrations.Migration):
    dependencies = [("shop", "0003_add_fields")]
    operations = [migrations.RunPython(fill, migrations.RunPython.noop)]
