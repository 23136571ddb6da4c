"""What the numbers are, and exact arithmetic on them: schemes, codes, scales, rounding; nothing here knows layers,
models or files."""
