from django.db import migrations, models


class Migration(migrations.Migration):
    initial = True
    operations = [
        migrations.CreateModel("Customer", [
            ("id", models.BigAutoField(primary_key=True, serialize=False, auto_created=True, verbose_name="ID")),
            ("name", models.CharField(max_length=100)),
            ("email", models.EmailField(max_length=254, unique=True)),
        ]),
        migrations.CreateModel("Product", [
            ("id", models.BigAutoField(primary_key=True, serialize=False, auto_created=True, verbose_name="ID")),
            ("sku", models.CharField(max_length=20, unique=True)),
            ("price", models.DecimalField(max_digits=8, decimal_places=2)),
            ("note", models.TextField(default="")),
        ]),
    ]
