"""Kernels: a file declares its rows as KERNELS, each a `kernels.kernel.Kernel` that says what it runs, why not, how it
lays weights out and how it multiplies."""
