"""llama.cpp's Q1_0: signs alone, a float16 scale for every 128 columns."""

from spicerack.numerics.levels import TableLevels
from spicerack.numerics.scheme import Scheme

SCHEME = Scheme(name="q1_0", levels=TableLevels((-1.0, 1.0)), group=(1, 128), scale="float16")
