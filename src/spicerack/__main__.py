"""`python -m spicerack`, for torchrun and for environments whose scripts are not on the path."""

from spicerack.cli import main

main()
