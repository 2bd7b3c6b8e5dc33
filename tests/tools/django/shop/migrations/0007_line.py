from django.db import migrations, models
import django.db.models.deletion


class Migration(migrations.Migration):
    dependencies = [("shop", "0006_rename")]
    operations = [
        migrations.CreateModel("Line", [
            ("id", models.BigAutoField(primary_key=True, serialize=False, auto_created=True, verbose_name="ID")),
            ("quantity", models.IntegerField()),
            ("order", models.ForeignKey(on_delete=django.db.models.deletion.CASCADE, to="shop.order")),
            ("product", models.ForeignKey(on_delete=django.db.models.deletion.PROTECT, to="shop.product")),
        ]),
        migrations.AddConstraint("Line", models.CheckConstraint(condition=models.Q(quantity__gt=0), name="some")),
    ]
