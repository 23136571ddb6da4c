"""What the numbers are, and exact arithmetic on them: schemes, codes, scales, rounding; nothing here knows layers,
models or files.

    scheme levels            what codes stand for, and which weights share a scale
    qtensor                  a quantized tensor, unpacked
    codec search             the specification: numbers to codes and back, and which scale a group gets
    rounding native          the same, fast
    bits packed              codes as streams of bits
    activations fake         what flows, as int8; rounding with gradients
    schemes/                 number systems, one file each

The specification is torch, slow and exact; what is fast must give the same codes and scales, bit for bit.
"""
