from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("shop", "0018_wider")]
    operations = [
        migrations.RunSQL("DROP TRIGGER shop_noted ON shop_item; DROP FUNCTION shop_noted()", migrations.RunSQL.noop),
        migrations.RemoveField("Item", "note"),
        migrations.AlterModelTable("Item", "item"),
    ]
