"""Kernels: a file declares its rows as KERNELS, each a `kernels.kernel.Kernel` that says what it runs, why not, how it
lays weights out and how it multiplies.

Nothing names a file here but itself: `kernels.kernel.table` finds all of them, and the order of rows is that of their
speeds. The reference comes last and runs everything.
"""
