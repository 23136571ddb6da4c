"""Quantization-aware training for any loop: layers that round while they learn."""
