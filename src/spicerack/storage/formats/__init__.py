"""Layouts of quantized tensors on disk, one file each: names, bytes and config, there and back."""
