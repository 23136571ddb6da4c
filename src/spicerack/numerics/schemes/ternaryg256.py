"""-1, 0 and +1, a float16 scale for every 256 columns: llama.cpp's TQ1_0 and TQ2_0, which pack it differently."""

from spicerack.numerics.levels import IntLevels
from spicerack.numerics.scheme import Scheme

SCHEME = Scheme(name="ternaryg256", levels=IntLevels(-1, 1), group=(1, 256), scale="float16")
