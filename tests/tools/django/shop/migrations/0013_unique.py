from django.db import migrations, models
import uuid


class Migration(migrations.Migration):
    dependencies = [("shop", "0012_tokens")]
    operations = [
        migrations.AlterField("Item", "token", models.UUIDField(default=uuid.uuid4, unique=True)),
    ]
