"""llama.cpp's Q2_0: -1, 0, 1 and 2, a float16 scale for every 64 columns."""

from spicerack.numerics.levels import IntLevels
from spicerack.numerics.scheme import Scheme

SCHEME = Scheme(name="q2_0", levels=IntLevels(-1, 2), group=(1, 64), scale="float16")
