"""torch itself: float32, bfloat16, dynamic int8 of torch.ao, and 4-bit weights with bfloat16 activations."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import nn

import spicerack
from benchmarks.harness.peers import decoder as decoders
from benchmarks.harness.peers import encoder as encoders
from benchmarks.harness.peers.layer import F32, Layer, Prepared, decoded, rounded, weight

Product = Callable[[torch.Tensor], torch.Tensor]


def layer(variant: str, what: Layer) -> Prepared:
    """variant: float32, bfloat16, int4 (in groups of 128), fbgemm or onednn (dynamic int8, weights per channel)."""
    torch.set_num_threads(what.threads)
    torch.set_grad_enabled(False)
    products, exact, nbytes = _products(variant, what.n, what.k, what.copies)
    x = torch.from_numpy(what.x).to(torch.bfloat16 if variant in ("bfloat16", "int4") else torch.float32)

    def call() -> list[torch.Tensor]:
        return [product(x) for product in products]

    return what.prepared(call, lambda: call()[0].float().numpy(), exact, nbytes)


@cache
def _products(variant: str, n: int, k: int, copies: int) -> tuple[list[Product], F32, float]:
    """The product with each copy, the first copy's weight, and bytes of one."""
    if variant in ("float32", "bfloat16"):
        whole = torch.from_numpy(weight(n, k)).to(getattr(torch, variant))
        rolled = [whole.roll(i, 0) for i in range(copies)]
        floats: list[Product] = [lambda x, w=w: nn.functional.linear(x, w) for w in rolled]  # type: ignore[misc]
        return floats, whole.float().numpy(), whole.nbytes
    if variant == "int4":
        codes, scales = rounded(n, k, 4, 128)
        exact, integers = decoded(codes, scales), torch.from_numpy(codes).int() + 8
        both = torch.stack([torch.from_numpy(scales.T), torch.zeros(k // 128, n)], 2).bfloat16()
        nibbles = [
            (torch._convert_weight_to_int4pack_for_cpu(integers.roll(i, 0), 1), both.roll(i, 1)) for i in range(copies)
        ]
        four: list[Product] = [
            lambda x, w=w, s=s: torch._weight_int4pack_mm_for_cpu(x, w, 128, s)  # type: ignore[misc]
            for w, s in nibbles
        ]
        return four, exact, n * k / 2 + 4 * n * k / 128
    codes, scales = rounded(n, k, 8, k)
    torch.backends.quantized.engine = variant
    exact = decoded(codes, scales)
    scale, zero = torch.from_numpy(scales[:, 0]).double(), torch.zeros(n, dtype=torch.long)
    tensor = torch.quantize_per_channel(torch.from_numpy(exact), scale, zero, 0, torch.qint8)
    ops = torch.ops.quantized
    parts = [
        ops.linear_prepack(
            torch._make_per_channel_quantized_tensor(tensor.int_repr().roll(i, 0), scale.roll(i), zero, 0), None
        )
        for i in range(copies)
    ]
    dynamic: list[Product] = [lambda x, w=w: ops.linear_dynamic(x, w, False) for w in parts]  # type: ignore[misc]
    return dynamic, exact, n * k + 4 * n


def encoder(variant: str, what: encoders.Encoder) -> Prepared:
    """variant: float32, bfloat16, or fbgemm for dynamic int8 with weights per channel."""
    torch.set_num_threads(what.threads)
    model: nn.Module = spicerack.load(what.folder, dtype=getattr(torch, variant, torch.float32))
    if variant == "fbgemm":
        torch.backends.quantized.engine = variant
        settings = {nn.Linear: torch.ao.quantization.per_channel_dynamic_qconfig}
        model = torch.ao.quantization.quantize_dynamic(model, settings, dtype=torch.qint8)
    return what.prepared(encoders.in_torch(model))


def decoder(variant: str, what: decoders.Decoder) -> Prepared:
    """variant: float32 or bfloat16."""
    torch.set_num_threads(what.threads)
    return decoders.in_torch(spicerack.load(what.folder, dtype=getattr(torch, variant)))
