"""Transforms, one file each: a block's float weights changed so that they are easier to round, and what it computes is
not."""
