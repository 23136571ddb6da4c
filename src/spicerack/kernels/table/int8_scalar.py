"""Int8 activations on portable C++, on every processor."""

from spicerack.kernels.table._panels import kernel

KERNEL = kernel("int8", "scalar", speed=15)
