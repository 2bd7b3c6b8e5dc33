from django.db import migrations, models
import uuid


class Migration(migrations.Migration):
    dependencies = [("shop", "0010_item")]
    operations = [
        migrations.AddField("Item", "token", models.UUIDField(null=True, default=uuid.uuid4)),
        migrations.AddField("Item", "details", models.JSONField(default=dict)),
    ]
