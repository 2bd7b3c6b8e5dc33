from django.db import migrations, models
import uuid


def fill(apps, schema_editor):
    item = apps.get_model("shop", "Item")
    for one in item.objects.all():
        one.token = uuid.uuid4()
        one.save(update_fields=["token"])


class Migration(migrations.Migration):
    dependencies = [("shop", "0011_token")]
    operations = [
        migrations.RunPython(fill, migrations.RunPython.noop),
    ]
