"""OCP microscaling: 4-bit floats E2M1, a power of two for every 32 columns (OCP MX specification v1.0, 2023)."""

from spicerack.numerics.levels import FloatLevels
from spicerack.numerics.scheme import Scheme

SCHEME = Scheme(name="mxfp4", levels=FloatLevels(2, 1), group=(1, 32), scale="float8_e8m0fnu")
