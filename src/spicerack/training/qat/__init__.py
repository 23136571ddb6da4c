"""Quantization-aware training for any loop: layers that round while they learn, put into a model and taken out of
it."""
