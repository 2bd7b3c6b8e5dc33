import django.contrib.postgres.fields
import django.db.models.deletion
import django.utils.timezone
from django.contrib.postgres.operations import AddIndexConcurrently
from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("shop", "0013_points")]
    operations = [
        migrations.RunSQL(
            """
            CREATE FUNCTION shop_total(the_order bigint) RETURNS numeric LANGUAGE sql STABLE AS $$
                SELECT coalesce(sum(l.quantity * a.price), 0) FROM shop_line l JOIN shop_article a ON a.id = l.article_id
                 WHERE l.order_id = the_order
            $$;
            CREATE VIEW shop_open AS SELECT id, customer_id, shop_total(id) AS total FROM shop_order WHERE state = 'new';
            COMMENT ON VIEW shop_open IS 'what; is not paid';
            UPDATE shop_customer SET points = id WHERE id % 3 = 0;
            """,
            "DROP VIEW shop_open; DROP FUNCTION shop_total(bigint);",
        ),
    ]
