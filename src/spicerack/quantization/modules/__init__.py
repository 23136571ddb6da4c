"""Quantized layers into a module in memory. `prepare_qat` decides by the same functions which layers it trains, so that
what is trained is what would be quantized.

    layers     which have a packed form
    schemes    what each gets
    floats     what stays as it is, and why
    checks     what is refused before a weight is rounded
    quantize   each weight rounded and packed
    copies     a copy of the module with those in its places
"""
