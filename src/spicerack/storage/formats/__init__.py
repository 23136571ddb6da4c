"""Layouts of quantized tensors on disk, one file each."""
