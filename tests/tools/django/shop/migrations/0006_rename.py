from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("shop", "0005_state")]
    operations = [
        migrations.RenameField("Customer", "name", "full_name"),
        migrations.AlterField("Customer", "full_name", models.CharField(max_length=200, db_index=True)),
    ]
