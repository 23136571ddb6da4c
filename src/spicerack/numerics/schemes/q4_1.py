"""llama.cpp's Q4_1: 4 bits, a float16 scale and a float16 minimum for every 32 columns."""

from spicerack.numerics.levels import IntLevels
from spicerack.numerics.scheme import Scheme

SCHEME = Scheme(name="q4_1", levels=IntLevels(0, 15), group=(1, 32), scale="float16", min="float16")
