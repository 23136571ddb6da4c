"""Whole models' speed."""
