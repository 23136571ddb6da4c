"""llama.cpp's Q5_1: 5 bits, a float16 scale and a float16 minimum for every 32 columns."""

from spicerack.numerics.levels import IntLevels
from spicerack.numerics.scheme import Scheme

SCHEME = Scheme(name="q5_1", levels=IntLevels(0, 31), group=(1, 32), scale="float16", min="float16")
