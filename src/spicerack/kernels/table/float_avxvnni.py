"""Float32 activations on AVX-VNNI, 256-bit vectors: Intel client processors without AVX-512."""

from spicerack.kernels.table._panels import kernel

KERNEL = kernel("float", "avxvnni", speed=40)
