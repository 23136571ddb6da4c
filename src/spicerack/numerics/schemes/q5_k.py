"""llama.cpp's Q5_K: 5 bits with a minimum, 6-bit scales and minima of 32 columns, float16 scales of those for 256."""

from spicerack.numerics.levels import IntLevels
from spicerack.numerics.scheme import Scheme

SIX_BITS = IntLevels(0, 63)
SCHEME = Scheme(
    name="q5_k",
    levels=IntLevels(0, 31),
    group=(1, 32),
    scale=Scheme(name="q5_k scales", levels=SIX_BITS, group=(1, 8), scale="float16"),
    min=Scheme(name="q5_k minima", levels=SIX_BITS, group=(1, 8), scale="float16"),
)
