from django.db import migrations, models
from django.contrib.postgres.operations import AddIndexConcurrently


class Migration(migrations.Migration):
    dependencies = [("shop", "0013_unique")]
    atomic = False
    operations = [
        AddIndexConcurrently("Item", models.Index(fields=["price"], name="item_price")),
    ]
