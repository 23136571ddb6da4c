"""Float32 activations on AVX-512 VNNI on 256-bit vectors."""

from spicerack.kernels.table._panels import kernel

KERNEL = kernel("float", "avx512vlvnni", speed=50)
