"""Int8 activations on AVX-512 VNNI on 256-bit vectors."""

from spicerack.kernels.table._panels import kernel

KERNEL = kernel("int8", "avx512vlvnni", speed=150)
