"""Transforms, one file each: float weights moved so that they are easier to round.

A new file here is a new transform. Its name is that of the file, in `--method`, recipes, ledgers and the docs; it
declares TRANSFORM, see `algorithms/transform.py`: a Scaling, which says what factors are worth a trial, or a Rotation.
Trying, judging, moving and undoing are the calibrated loop's, the same for all of them.
"""
