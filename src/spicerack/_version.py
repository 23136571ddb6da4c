"""The version: what files record of who wrote them, and the one place that says it."""

__version__ = "0.1.0"
