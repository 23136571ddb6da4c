"""Solvers, one file each: from a float weight, and from nothing, its inputs' moments or its block, to codes and
scales."""
