"""The numbers that an engine can hold a model's weights in, and what each weight then takes, to the byte.

    bf16            as in the files, in 16 bits
    w4g128 ...      our schemes, laid out as `quantize` writes them (`models.sizes`)
    Q4_K_M ...      llama.cpp's mixtures (`gguf`)
    4bit ...        MLX's: a scale and an offset in 16 bits for each group of 64, tables and heads too
    mxfp4           experts as gpt-oss is distributed
    nf4, int8       bitsandbytes', as transformers loads them

What is summed up is where a weight lies and who reads it, which is all that placement and speed ask of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from spicerack.models.sizes import sized
from spicerack.numerics.scheme import parse
from spicerack.planning import gguf
from spicerack.planning.model import Model, Weight
from spicerack.planning.sensitivity import Metric

Weigher = Callable[[Model], list[int]]
"""model -> bytes of each of its weights, all that are alike together."""


@dataclass(frozen=True, slots=True)
class Lost:
    """A measured loss.

    metric  nats of KL per token, or 1 - cosine of a sentence's embedding
    mean    in that unit
    ends    of its 95 % interval; None where there is none
    tokens  that were read, or predicted
    text    that they are of; "" where nobody kept its name
    by      who measured, for people
    """

    metric: Metric
    mean: float
    ends: tuple[float, float] | None
    tokens: int
    text: str
    by: str

    def as_dict(self) -> dict[str, Any]:
        """JSON."""
        return {
            "metric": self.metric, "mean": self.mean, "ci95": None if self.ends is None else list(self.ends),
            "tokens": self.tokens, "text": self.text, "by": self.by,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Precision:
    """One way to hold the weights.

    name     as people know it
    bits     of a weight of a linear layer, scales left out: what the expected loss goes by
    weigh    bytes of each weight
    scheme   that `quantize` makes it with; None where it is made elsewhere
    tables   those that `quantize` gives tables of tokens and heads; None where these stay in float
    released the model is distributed in it: nothing is lost
    stored   what `export --to` calls the files that hold them, which are there already; None: they would be made
    lost     what was measured of files that are there; None: nothing was
    """

    name: str
    bits: float
    weigh: Weigher
    scheme: str | None = None
    tables: tuple[str, str] | None = None
    released: bool = False
    stored: str | None = None
    lost: Lost | None = None


@dataclass(frozen=True, slots=True)
class Block:
    """Bytes of one layer. dense: what every token reads; routed: of all routed experts."""

    dense: int
    routed: int

    @property
    def total(self) -> int:
        """Both."""
        return self.dense + self.routed


@dataclass(frozen=True, slots=True)
class Weighed:
    """A model's bytes in one precision, by who holds them.

    blocks   of the decoder, first to last
    input    the table of tokens
    output   the head, and the norm before it; without a table that is the head
    tower    for pictures and sound
    encoder  of an encoder-decoder
    extra    in the file alone: layers that predict several tokens
    read     of what one token reads, alone
    """

    blocks: tuple[Block, ...]
    input: int
    output: int
    tower: int
    encoder: int
    extra: int
    read: int

    @property
    def total(self) -> int:
        """All that is in memory, tied tables once."""
        return sum(block.total for block in self.blocks) + self.input + self.output + self.tower + self.encoder

    @property
    def file(self) -> int:
        """All that is in the files."""
        return self.total + self.extra


@lru_cache(maxsize=1024)  # a plan asks for each of them several times, for every device
def weighed(model: Model, precision: Precision) -> Weighed:
    """The sums of `precision.weigh`."""
    sums = dict.fromkeys(("input", "output", "tower", "encoder", "extra"), 0)
    dense, routed = [0] * len(model.layers), [0] * len(model.layers)
    for weight, nbytes in zip(model.weights, precision.weigh(model), strict=True):
        if weight.layer is None:
            sums[weight.place] += nbytes
        else:
            (routed if weight.routed else dense)[weight.layer] += nbytes
    head = sums["output"] + (sums["input"] if model.tied else 0)
    read = sum(dense) + round(sum(routed) * model.used) + head
    blocks = tuple(map(Block, dense, routed))
    return Weighed(blocks, **sums, read=read)


def ours(name: str) -> Precision:
    """One of our schemes, by its name."""
    scheme = parse(name)

    def weigh(model: Model) -> list[int]:
        sizes = sized(model.census, scheme)
        return [sizes[weight.entry.name].nbytes * weight.count for weight in model.weights]

    return Precision(name, scheme.bits, weigh, name)


def floats(name: str = "bf16") -> Precision:
    """In 16 bits, whatever the files have."""
    return Precision(name, 16, lambda model: [2 * weight.numel for weight in model.weights])


def as_stored(name: str = "as stored") -> Precision:
    """Floats of the model's own type, as transformers and spicerack load them."""
    return Precision(name, 16, lambda model: [weight.entry.info.nbytes * weight.count for weight in model.weights])


def mixture(name: str) -> Precision:
    """One of llama.cpp's."""
    released = gguf.MIXTURES[name].experts is not None
    bits = 4.0 if released else 16.0 if name == "F16" else float(name[1])
    exact = {"Q8_0": ("w8g32", "w8g32"), "Q4_0": ("w4g32", "q6_k")}  # the same numbers, of layers and of the head
    layers, head = exact.get(name, (None, None))
    tables = None if layers is None or head is None else (layers, head)
    return Precision(name, bits, lambda model: gguf.weigh(model, name), layers, tables, released=released)


def affine(name: str, bits: int, group: int = 64) -> Precision:
    """MLX's: matrices, tables and heads in `bits`, a scale and an offset of 16 bits for each group."""

    def one(weight: Weight) -> int:
        shape = weight.entry.matrix_shape if len(weight.entry.info.shape) > 1 else ()
        quantized = weight.entry.role in ("linear", "experts", "embedding", "head") and weight.place != "tower"
        if not shape or not quantized or shape[-1] % group:
            return 2 * weight.numel
        return weight.numel * bits // 8 + weight.numel // group * 4

    return Precision(name, bits, lambda model: [one(weight) for weight in model.weights])


def experts_in_mxfp4() -> Precision:
    """Experts in MXFP4 and all else in 16 bits: gpt-oss as it is distributed. 17 bytes hold 32 weights."""

    def one(weight: Weight) -> int:
        if weight.routed and weight.entry.role in ("linear", "experts"):
            return weight.numel // 32 * 17
        return 2 * weight.numel

    return Precision("mxfp4", 4, lambda model: [one(weight) for weight in model.weights], released=True)


def bitsandbytes(name: str, bits: float, stored_bits: float) -> Precision:
    """Linear layers in what bitsandbytes makes of them as transformers loads a model; all else in 16 bits."""

    def one(weight: Weight) -> int:
        return round(weight.numel * stored_bits / 8) if weight.entry.role in ("linear", "experts") else 2 * weight.numel

    return Precision(name, bits, lambda model: [one(weight) for weight in model.weights])
