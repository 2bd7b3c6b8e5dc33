from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("shop", "0004_active")]
    operations = [
        migrations.AddField("Customer", "state", models.CharField(max_length=10, choices=[("new", "New"), ("known", "Known")], default="new")),
        migrations.AddConstraint("Customer", models.CheckConstraint(condition=models.Q(state__in=["new", "known"]), name="known_state")),
    ]
