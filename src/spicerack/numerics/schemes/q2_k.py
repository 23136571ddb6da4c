"""llama.cpp's Q2_K: 2 bits with a minimum, 4-bit scales and minima of 16 columns, float16 scales of those for 256."""

from spicerack.numerics.levels import IntLevels
from spicerack.numerics.scheme import Scheme

FOUR_BITS = IntLevels(0, 15)
SCHEME = Scheme(
    name="q2_k",
    levels=IntLevels(0, 3),
    group=(1, 16),
    scale=Scheme(name="q2_k scales", levels=FOUR_BITS, group=(1, 16), scale="float16"),
    min=Scheme(name="q2_k minima", levels=FOUR_BITS, group=(1, 16), scale="float16"),
)
