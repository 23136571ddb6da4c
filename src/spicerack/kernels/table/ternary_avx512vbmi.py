"""Ternary weights in 1.6 bits, split by byte permutations and bit matrices (AVX-512 VBMI, GFNI) for AVX-512 VNNI."""

from spicerack.kernels.table._panels import kernel

KERNEL = kernel("int8", "avx512vbmi", speed=170, layout="trits")
