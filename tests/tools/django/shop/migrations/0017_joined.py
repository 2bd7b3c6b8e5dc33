from django.db import migrations, models
import django.utils.timezone


class Migration(migrations.Migration):
    dependencies = [("shop", "0016_number")]
    operations = [
        migrations.AddField("Customer", "joined", models.DateTimeField(default=django.utils.timezone.now)),
    ]
