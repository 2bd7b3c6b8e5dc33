import django.contrib.postgres.fields
import django.db.models.deletion
import django.utils.timezone
from django.contrib.postgres.operations import AddIndexConcurrently
from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("shop", "0002_order")]
    operations = [
        migrations.AddField("customer", "joined", models.DateTimeField(default=django.utils.timezone.now)),
        migrations.AddField("customer", "active", models.BooleanField(default=True)),
        migrations.AddField("order", "placed", models.DateTimeField(auto_now_add=True, default=django.utils.timezone.now), preserve_default=False),
    ]
