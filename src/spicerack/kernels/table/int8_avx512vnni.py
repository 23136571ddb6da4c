"""Int8 activations on AVX-512 with VNNI: 16 rows in a vector, 64 multiply-adds in an instruction."""

from spicerack.kernels.table._panels import kernel

KERNEL = kernel("int8", "avx512vnni", speed=160)
