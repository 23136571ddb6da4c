"""What a quantized model still writes."""
