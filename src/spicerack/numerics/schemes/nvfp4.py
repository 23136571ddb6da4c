"""NVIDIA's 4-bit floats: E2M1, an E4M3 scale for every 16 columns, and one float32 scale for the tensor."""

from spicerack.numerics.levels import FloatLevels
from spicerack.numerics.scheme import Scheme

SCALES = Scheme(name="nvfp4 scales", levels=FloatLevels(4, 3, max_value=448), group=(None, None), scale="float32")
SCHEME = Scheme(name="nvfp4", levels=FloatLevels(2, 1), group=(1, 16), scale=SCALES)
