"""What the application does all day; argument: how often."""

import uuid

from django.core.management.base import BaseCommand
from django.db import transaction

from shop.models import Customer, Item, Line, Order, Tag


class Command(BaseCommand):
    def add_arguments(self, parser):
        parser.add_argument("times", type=int)

    def handle(self, *args, times, **options):
        for _ in range(times):
            with transaction.atomic():
                name = uuid.uuid4().hex
                customer = Customer.objects.create(full_name=name, email=f"{name}@example.org", state=Customer.State.KNOWN)
                item = Item.objects.create(sku=name[:30], price="12.50", details={"of": name})
                item.tags.add(Tag.objects.get_or_create(name="new")[0])
                order = Order.objects.create(customer=customer, number=1)
                Line.objects.create(order=order, item=item, quantity=2)
                Item.objects.filter(price__lt=5).update(price="5.00")
        last = Order.objects.select_related("customer").order_by("-id").first()
        assert last.line_set.get().quantity == 2 and last.customer.state == "known"
        self.stdout.write(f"{Customer.objects.count()} customers")
