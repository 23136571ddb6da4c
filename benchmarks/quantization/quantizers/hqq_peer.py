"""HQQ: its solver at its own settings (`optimize=True`), scales and zero points stored as float16.

It looks at the weights only. `w4g64` groups along a row (axis 1, where its README tells to start); `w4g64,axis0` groups
across rows, which its fast kernels cannot read.
"""

from __future__ import annotations

import time

import exchange
import torch
from hqq.core.quantize import BaseQuantizeConfig, Quantizer


def main() -> None:
    given = exchange.job()
    bits, group, words = given.integers()
    axis = 0 if "axis0" in words else 1
    settings = BaseQuantizeConfig(nbits=bits, group_size=group, axis=axis)
    decoded = {}
    stored = weights = 0
    begin = time.perf_counter()
    for name, weight in given.weights().items():
        codes, meta = Quantizer.quantize(weight, **settings["weight_quant_params"], device="cpu")
        for key in ("scale", "zero"):
            half = meta[key].half()
            stored += half.nbytes
            meta[key] = half.float()
        stored += codes.nbytes
        weights += weight.numel()
        # arithmetic in float32, so that only what is stored is rounded
        decoded[name] = Quantizer.dequantize(codes, meta | {"compute_dtype": torch.float32})
    seconds = time.perf_counter() - begin
    exchange.finish(
        given, decoded, "hqq", bits=stored * 8 / weights, seconds=seconds, notes=f"axis {axis}, no calibration"
    )


if __name__ == "__main__":
    main()
