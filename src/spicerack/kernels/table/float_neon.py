"""Float32 activations on NEON with dot products (Armv8.2 and newer)."""

from spicerack.kernels.table._panels import kernel

KERNEL = kernel("float", "neon", speed=20)
