"""Codes chosen by what flows through a model, block by block: `loop.py` says how, and what that gives up."""
