"""A small shop whose twenty migrations are what Django sends in earnest: tests/e2e/migration_tools.rs runs it."""

import os
import sys

from django.core.management import execute_from_command_line

if __name__ == "__main__":
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "settings")
    execute_from_command_line(sys.argv)
