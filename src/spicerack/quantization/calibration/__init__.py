"""Codes chosen by what flows through a model, block by block."""
