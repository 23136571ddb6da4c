"""llama.cpp's Q3_K: 3 bits, signed 6-bit scales of 16 columns, a float16 scale of those for 256."""

from spicerack.numerics.levels import IntLevels
from spicerack.numerics.scheme import Scheme

SCHEME = Scheme(
    name="q3_k",
    levels=IntLevels(-4, 3),
    group=(1, 16),
    scale=Scheme(name="q3_k scales", levels=IntLevels(-32, 31), group=(1, 16), scale="float16"),
)
