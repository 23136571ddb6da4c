"""Int8 activations on NEON with dot products (Armv8.2 and newer)."""

from spicerack.panels import kernel

KERNEL = kernel("int8", "neon", speed=120)
