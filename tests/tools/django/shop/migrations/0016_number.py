from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("shop", "0015_tags")]
    operations = [
        migrations.RenameField("Order", "created", "placed"),
        migrations.AddField("Order", "number", models.PositiveIntegerField(null=True)),
        migrations.AddConstraint("Order", models.UniqueConstraint(
            fields=["customer", "number"], name="one_number", deferrable=models.Deferrable.DEFERRED)),
    ]
