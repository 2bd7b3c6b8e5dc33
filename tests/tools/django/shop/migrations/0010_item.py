from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("shop", "0009_sql")]
    operations = [
        migrations.RenameModel("Product", "Item"),
        migrations.RenameField("Line", "product", "item"),
    ]
