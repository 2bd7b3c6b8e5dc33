from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("shop", "0008_orders")]
    operations = [
        migrations.RunSQL("""
            CREATE VIEW open_order AS SELECT o.id, c.email FROM shop_order o JOIN shop_customer c ON c.id = o.customer_id WHERE c.state IN ('new', 'known');
            CREATE FUNCTION shop_noted() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.note := coalesce(NEW.note, ''); RETURN NEW; END $$;
            CREATE TRIGGER shop_noted BEFORE INSERT ON shop_product FOR EACH ROW EXECUTE FUNCTION shop_noted();
            COMMENT ON VIEW open_order IS 'what is open; for reports'
        """, "DROP VIEW open_order; DROP TRIGGER shop_noted ON shop_product; DROP FUNCTION shop_noted()"),
    ]
