"""Layouts of quantized tensors on disk, one file each: a file `name.py` declares FORMAT, a `storage.format.Format` of
that name: tensor names, bytes and config, there and back, and whether it is chosen before others.
"""
