"""Solvers, one file each: from a float weight to its codes."""
