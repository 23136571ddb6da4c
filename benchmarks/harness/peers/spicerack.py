"""spicerack, as a user would run it, and the machine's limits, measured by its native module."""

from __future__ import annotations

import dataclasses
import time
from functools import cache
from pathlib import Path

import torch
from transformers import PreTrainedModel

import spicerack
from benchmarks.harness.peers import decoder as decoders
from benchmarks.harness.peers import encoder as encoders
from benchmarks.harness.peers.layer import F32, Layer, Prepared, weight
from spicerack.kernels import limits
from spicerack.nn.linear import QLinear
from spicerack.numerics import codec, rounding
from spicerack.numerics.qtensor import QTensor
from spicerack.numerics.scheme import Scheme, parse

_BYTES = 1 << 29
"""Read for the bandwidth: far beyond any cache."""


def layer(variant: str, what: Layer) -> Prepared:
    """variant: a scheme's name."""
    torch.set_num_threads(what.threads)
    torch.set_grad_enabled(False)
    layers, exact, nbytes = _layers(variant, what.n, what.k, what.copies)
    x = torch.from_numpy(what.x)

    def call() -> list[torch.Tensor]:
        return [layer(x) for layer in layers]

    prepared = what.prepared(call, lambda: call()[0].numpy(), exact, nbytes)
    return dataclasses.replace(prepared, facts=prepared.facts | {"kernel": layers[0].packed.choice.kernel.name})


def limit(variant: str, threads: int) -> Prepared:
    """variant: read_bandwidth (bytes/s from memory) or dot_peak (int8 operations/s), of all threads together."""
    if variant == "dot_peak":
        return Prepared(lambda: {variant: limits.dot_peak(threads)})
    return Prepared(lambda: {variant: limits.read_bandwidth(_BYTES, threads)})


@cache
def _layers(variant: str, n: int, k: int, copies: int) -> tuple[tuple[QLinear, ...], F32, float]:
    q = _quantized(parse(variant), n, k)
    exact: F32 = codec.decode(q).float().numpy()
    layers = tuple(QLinear.of(_rolled(q, i), dtype=torch.float32) for i in range(copies))
    return layers, exact, float(layers[0].packed.nbytes)


def _quantized(scheme: Scheme, n: int, k: int) -> QTensor:
    if scheme.group == (None, None):  # nearly all weights of a whole tensor would round to 0
        codes = torch.randint(-1, 2, (n, k), dtype=torch.int8, generator=torch.Generator().manual_seed(n + k))
        return QTensor(scheme, codes, torch.full((1, 1), (1.5 / k) ** 0.5, dtype=torch.float16))
    return rounding.to_nearest(torch.from_numpy(weight(n, k)), scheme, range_="absmax", threads=torch.get_num_threads())


def _rolled(q: QTensor, i: int) -> QTensor:
    """The same with rows moved by i: other contents, the same work."""
    assert isinstance(q.scale, torch.Tensor)
    zero = None if q.zero is None else q.zero.roll(i, 0)
    return dataclasses.replace(q, codes=q.codes.roll(i, 0), scale=q.scale.roll(i, 0), zero=zero)


def encoder(variant: str, what: encoders.Encoder) -> Prepared:
    """variant: a scheme's name."""
    torch.set_num_threads(what.threads)
    return what.prepared(
        encoders.in_torch(spicerack.load(_folder(variant, what.folder, what.scratch), engine=what.engine))
    )


def decoder(variant: str, what: decoders.Decoder) -> Prepared:
    """The whole model, through transformers. variant: a scheme's name; the head is w8."""
    torch.set_num_threads(what.threads)
    return decoders.in_torch(_decoder(variant, what))


def linears(variant: str, what: decoders.Decoder) -> Prepared:
    """All linear layers of the same model alone, one after another, on inputs that are there already.

    Those that share an input in the model (q, k and v; gate and up) are given the same tensor.
    """
    torch.set_num_threads(what.threads)
    model = _decoder(variant, what)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QLinear)}

    def inputs(rows: int) -> list[torch.Tensor]:
        shared = {_source(name): torch.randn(rows, layer.in_features).to(model.dtype) for name, layer in layers.items()}
        return [shared[_source(name)] for name in layers]

    prompt, single = inputs(decoders.PROMPT), inputs(1)
    prompt[list(layers).index("lm_head")] = single[-1]  # only the last token's logits are needed

    def multiply(xs: list[torch.Tensor]) -> None:
        for layer, x in zip(layers.values(), xs, strict=True):
            layer(x)

    @torch.no_grad()
    def turn(decode: int = decoders.DECODE) -> dict[str, float]:
        begin = time.perf_counter()
        multiply(prompt)
        middle = time.perf_counter()
        for _ in range(decode):
            multiply(single)
        return decoders.speeds(begin, middle, decode)

    turn(2)
    return Prepared(turn, {"bytes": sum(layer.packed.nbytes for layer in layers.values())})


def _source(name: str) -> str:
    """What layers with the same input have in common: module, and which of its inputs."""
    parent, _, kind = name.rpartition(".")
    shared = {"q_proj": "attention", "k_proj": "attention", "v_proj": "attention", "gate_proj": "mlp", "up_proj": "mlp"}
    return f"{parent}.{shared.get(kind, kind)}"


@cache
def _decoder(variant: str, what: decoders.Decoder) -> PreTrainedModel:
    """In float32 around the packed layers: the processor computes in it, and bfloat16 would be converted each time."""
    return spicerack.load(_folder(variant, what.folder, what.scratch, ("lm_head=w8",)), dtype=torch.float32)


def _folder(scheme: str, source: Path, scratch: Path, rules: tuple[str, ...] = ()) -> Path:
    """The quantized folder, made in `scratch` if it is not there yet. absmax is enough for speeds of random weights."""
    folder = scratch / scheme
    if not folder.is_dir():
        spicerack.quantize(source, scheme, output=folder, rules=rules, range_="absmax" if rules else "opt")
    return folder
