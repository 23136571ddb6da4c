"""Int8 activations on portable C++, on every processor."""

from spicerack.panels import kernel

KERNEL = kernel("int8", "scalar", speed=15)
