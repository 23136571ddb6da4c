"""Modules whose weights stay packed, and what a model gains by knowing its own structure: shared inputs, fused
activations, a cache in few bits."""
