"""llama.cpp's IQ4_NL: 16 integers, denser around 0, and a float16 scale for every 32 columns."""

from spicerack.numerics.levels import TableLevels
from spicerack.numerics.scheme import Scheme

VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
SCHEME = Scheme(name="iq4_nl", levels=TableLevels(tuple(map(float, VALUES))), group=(1, 32), scale="float16")
