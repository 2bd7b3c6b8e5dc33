from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("shop", "0017_joined")]
    operations = [
        migrations.AlterField("Item", "price", models.DecimalField(max_digits=12, decimal_places=2)),
        migrations.AlterField("Item", "sku", models.CharField(max_length=30, unique=True)),
    ]
