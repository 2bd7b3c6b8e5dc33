import django.contrib.postgres.fields
import django.db.models.deletion
import django.utils.timezone
from django.contrib.postgres.operations import AddIndexConcurrently
from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("shop", "0014_sql")]
    operations = [
        migrations.AddConstraint("order", models.UniqueConstraint(fields=("customer", "number"), name="one_number_each")),
        migrations.AlterUniqueTogether("article", {("title", "price")}),
    ]
