import django.contrib.postgres.fields
import django.db.models.deletion
import django.utils.timezone
from django.contrib.postgres.operations import AddIndexConcurrently
from django.db import migrations, models


def fill(apps, schema_editor):
    tag = apps.get_model("shop", "Tag")
    new = tag.objects.create(label="new")
    for article in apps.get_model("shop", "Article").objects.filter(price__lt=10):
        article.tags.add(new)
        article.data = {"tagged": True}
        article.sizes = [1, 2]
        article.save()


class Migration(migrations.Migration):
    dependencies = [("shop", "0017_tags")]
    operations = [migrations.RunPython(fill, migrations.RunPython.noop)]
