from django.db import migrations, models


def fill(apps, schema_editor):
    customer = apps.get_model("shop", "Customer")
    customer.objects.bulk_create(customer(name=f"customer {n}", email=f"{n}@example.org") for n in range(300))
    product = apps.get_model("shop", "Product")
    product.objects.bulk_create(product(sku=f"sku {n}", price=n) for n in range(50))


class Migration(migrations.Migration):
    dependencies = [("shop", "0002_order")]
    operations = [
        migrations.RunPython(fill, migrations.RunPython.noop),
    ]
