import uuid

from django.db import models
from django.utils import timezone


class Tag(models.Model):
    name = models.CharField(max_length=40, unique=True)


class Customer(models.Model):
    class State(models.TextChoices):
        NEW = "new"
        KNOWN = "known"

    full_name = models.CharField(max_length=200, db_index=True)
    email = models.EmailField(unique=True)
    active = models.BooleanField(default=True)
    state = models.CharField(max_length=10, choices=State.choices, default=State.NEW)
    joined = models.DateTimeField(default=timezone.now)
    friends = models.ManyToManyField("self", blank=True)

    class Meta:
        constraints = [models.CheckConstraint(condition=models.Q(state__in=["new", "known"]), name="known_state")]


class Item(models.Model):
    sku = models.CharField(max_length=30, unique=True)
    price = models.DecimalField(max_digits=12, decimal_places=2)
    token = models.UUIDField(default=uuid.uuid4, unique=True)
    details = models.JSONField(default=dict)
    tags = models.ManyToManyField(Tag)

    class Meta:
        db_table = "item"
        indexes = [models.Index(fields=["price"], name="item_price")]


class Order(models.Model):
    customer = models.ForeignKey(Customer, on_delete=models.CASCADE)
    placed = models.DateTimeField(auto_now_add=True)
    number = models.PositiveIntegerField(null=True)

    class Meta:
        constraints = [models.UniqueConstraint(fields=["customer", "number"], name="one_number", deferrable=models.Deferrable.DEFERRED)]


class Line(models.Model):
    order = models.ForeignKey(Order, on_delete=models.CASCADE)
    item = models.ForeignKey(Item, on_delete=models.PROTECT)
    quantity = models.IntegerField()

    class Meta:
        constraints = [models.CheckConstraint(condition=models.Q(quantity__gt=0), name="some")]
