"""`ternary` with int8 activations, one scale per token, as BitNet b1.58 has them (Ma et al. 2024, arXiv:2402.17764)."""

from spicerack.numerics.levels import IntLevels
from spicerack.numerics.scheme import Scheme

SCHEME = Scheme(name="ternarya8", levels=IntLevels(-1, 1), group=(None, None), activations="token")
