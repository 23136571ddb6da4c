"""BitNet b1.58: -1, 0 and +1, one scale for the tensor, stored in 2 bits (Ma et al. 2024, arXiv:2402.17764)."""

from spicerack.numerics.levels import IntLevels
from spicerack.numerics.scheme import Scheme

SCHEME = Scheme(name="ternary", levels=IntLevels(-1, 1), group=(None, None))
