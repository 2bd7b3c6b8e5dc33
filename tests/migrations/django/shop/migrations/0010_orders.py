import django.contrib.postgres.fields
import django.db.models.deletion
import django.utils.timezone
from django.contrib.postgres.operations import AddIndexConcurrently
from django.db import migrations, models


def fill(apps, schema_editor):
    order = apps.get_model("shop", "Order")
    line = apps.get_model("shop", "Line")
    customers = list(apps.get_model("shop", "Customer").objects.order_by("id")[:40])
    article = apps.get_model("shop", "Article").objects.order_by("id").first()
    orders = order.objects.bulk_create(order(number=n, customer=c) for n, c in enumerate(customers))
    line.objects.bulk_create(line(order=o, article=article, quantity=o.number % 5 + 1) for o in orders)


class Migration(migrations.Migration):
    dependencies = [("shop", "0009_line")]
    operations = [migrations.RunPython(fill, migrations.RunPython.noop)]
