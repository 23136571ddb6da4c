"""Solvers, one file each: from a float weight to its codes.

A new file here is a new solver. Its name is that of the file, in `--method`, recipes, ledgers and the docs; it declares
SOLVER, see `algorithms/solver.py`, and whoever plans memory, calls solvers or refuses a scheme asks that. Files see
`numerics` and what lies in front of this folder, and never each other: a solver that builds on another one names it.
"""
