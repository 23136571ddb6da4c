"""Kernels, one row each: what it runs, why not, how it lays weights out and how it multiplies."""
