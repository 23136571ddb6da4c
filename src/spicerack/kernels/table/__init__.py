"""Kernels, one row each: what it runs, how it lays weights out, how it multiplies."""
