from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("shop", "0014_concurrently")]
    operations = [
        migrations.CreateModel("Tag", [
            ("id", models.BigAutoField(primary_key=True, serialize=False, auto_created=True, verbose_name="ID")),
            ("name", models.CharField(max_length=40, unique=True)),
        ]),
        migrations.AddField("Item", "tags", models.ManyToManyField(to="shop.tag")),
        migrations.AddField("Customer", "friends", models.ManyToManyField(blank=True, to="shop.customer")),
    ]
