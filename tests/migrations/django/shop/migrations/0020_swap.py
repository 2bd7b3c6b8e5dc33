import django.contrib.postgres.fields
import django.db.models.deletion
import django.utils.timezone
from django.contrib.postgres.operations import AddIndexConcurrently
from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("shop", "0019_scratch")]
    operations = [
        migrations.RunSQL(
            """
            CREATE TABLE shop_line_new (LIKE shop_line INCLUDING ALL);
            INSERT INTO shop_line_new SELECT * FROM shop_line;
            ALTER TABLE shop_line RENAME TO shop_line_old;
            ALTER TABLE shop_line_new RENAME TO shop_line;
            ALTER TABLE shop_line ADD CONSTRAINT shop_line_order_fk FOREIGN KEY (order_id) REFERENCES shop_order (id) DEFERRABLE INITIALLY DEFERRED;
            DROP TABLE shop_line_old;
            """,
            migrations.RunSQL.noop,
        ),
        migrations.DeleteModel("Scratch"),
    ]
