"""Float32 activations on portable C++, on every processor."""

from spicerack.kernels.table._panels import kernel

KERNEL = kernel("float", "scalar", speed=10)
