"""The models as of the last migration."""
from django.contrib.postgres.fields import ArrayField
from django.db import models
from django.db.models import Q
from django.utils import timezone


class Tag(models.Model):
    label = models.CharField(max_length=80, unique=True)


class Customer(models.Model):
    full_name = models.CharField(max_length=200)
    email = models.EmailField(null=True, unique=True)
    joined = models.DateTimeField(default=timezone.now)
    active = models.BooleanField(default=True)
    points = models.BigIntegerField(default=0, db_default=0)

    class Meta:
        constraints = [
            models.CheckConstraint(condition=Q(points__gte=0), name="points_not_negative")
        ]
        indexes = [models.Index(fields=["full_name"], name="customer_by_name")]


class Article(models.Model):
    title = models.TextField()
    price = models.DecimalField(max_digits=12, decimal_places=2, default="0.00")
    data = models.JSONField(default=dict)
    sizes = ArrayField(models.IntegerField(), default=list)
    tags = models.ManyToManyField(Tag)

    class Meta:
        unique_together = [("title", "price")]


class Order(models.Model):
    customer = models.ForeignKey(Customer, on_delete=models.CASCADE)
    number = models.PositiveIntegerField()
    placed = models.DateTimeField(auto_now_add=True)
    state = models.CharField(max_length=20, default="new", db_index=True)

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["customer", "number"], name="one_number_each")
        ]


class Line(models.Model):
    order = models.ForeignKey(Order, on_delete=models.CASCADE, related_name="lines")
    article = models.ForeignKey(Article, on_delete=models.PROTECT)
    quantity = models.SmallIntegerField(default=1)
    note = models.TextField(blank=True, default="")
