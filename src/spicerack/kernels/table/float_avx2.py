"""Float32 activations on AVX2: pairs of int8 products in 16 bits, then sums of pairs."""

from spicerack.kernels.table._panels import kernel

KERNEL = kernel("float", "avx2", speed=30)
