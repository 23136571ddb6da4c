"""8-bit floats, E4M3 without infinities, one scale per output row (Micikevicius et al. 2022, arXiv:2209.05433)."""

from spicerack.numerics.levels import FloatLevels
from spicerack.numerics.scheme import Scheme

SCHEME = Scheme(name="fp8", levels=FloatLevels(4, 3, max_value=448))
