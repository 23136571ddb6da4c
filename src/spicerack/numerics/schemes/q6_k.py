"""llama.cpp's Q6_K: 6 bits, signed 8-bit scales of 16 columns, a float16 scale of those for 256."""

from spicerack.numerics.levels import IntLevels
from spicerack.numerics.scheme import Scheme

SCHEME = Scheme(
    name="q6_k",
    levels=IntLevels(-32, 31),
    group=(1, 16),
    scale=Scheme(name="q6_k scales", levels=IntLevels(-128, 127), group=(1, 16), scale="float16"),
)
