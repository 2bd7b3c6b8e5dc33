#!/usr/bin/env python3
"""What the application does with its newest models; fails where something is not as they are."""
import os

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "settings")
import django

django.setup()
from django.db import connection, transaction
from shop.models import Article, Customer, Line, Order, Tag

with transaction.atomic():
    customer = Customer.objects.create(full_name="A new customer", email="new@example.org")
    article = Article.objects.create(title="A new article", price="12.50", data={"a": 1}, sizes=[3])
    article.tags.add(Tag.objects.get_or_create(label="fresh")[0])
    order = Order.objects.create(customer=customer, number=1)
    Line.objects.create(order=order, article=article, quantity=2)
assert Line.objects.filter(order__customer__full_name="A new customer").count() == 1
assert Customer.objects.filter(points__gt=0).exists()
with connection.cursor() as cursor:
    cursor.execute("SELECT total FROM shop_open WHERE id = %s", [order.id])
    assert cursor.fetchone()[0] == 25
print("ok")
