from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("shop", "0003_fill")]
    operations = [
        migrations.AddField("Customer", "active", models.BooleanField(default=True)),
        migrations.AlterField("Customer", "name", models.CharField(max_length=200)),
    ]
