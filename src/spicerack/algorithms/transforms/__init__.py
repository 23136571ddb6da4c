"""Transforms, one file each: float weights moved so that they are easier to round."""
