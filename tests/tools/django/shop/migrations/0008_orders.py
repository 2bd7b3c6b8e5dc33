from django.db import migrations, models


def fill(apps, schema_editor):
    customer, order = apps.get_model("shop", "Customer"), apps.get_model("shop", "Order")
    product, line = apps.get_model("shop", "Product"), apps.get_model("shop", "Line")
    first = product.objects.first()
    for one in customer.objects.all()[:100]:
        placed = order.objects.create(customer=one)
        line.objects.create(order=placed, product=first, quantity=3)


class Migration(migrations.Migration):
    dependencies = [("shop", "0007_line")]
    operations = [
        migrations.RunPython(fill, migrations.RunPython.noop),
    ]
