"""`ternary` with int8 activations, one scale per token, as BitNet b1.58 has them (Ma et al. 2024, arXiv:2402.17764)."""

from dataclasses import replace

from spicerack.schemes import ternary

SCHEME = replace(ternary.SCHEME, name="ternarya8", activations="token")
