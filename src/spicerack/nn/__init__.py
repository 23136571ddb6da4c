"""Modules whose weights stay packed, and what a model gains by knowing its structure."""
