"""GPTQ, AWQ and MLX: golden bytes, both ways; what strangers' folders may have in them."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from spicerack.errors import CheckpointError, SpicerackError
from spicerack.numerics import codec
from spicerack.numerics.dtypes import BY_SAFETENSORS, safetensors_dtype
from spicerack.numerics.qtensor import QTensor
from spicerack.numerics.scheme import parse
from spicerack.storage import format as formats
from spicerack.storage.format import Reading, StoredTensor
from spicerack.storage.reader import Checkpoint, TensorInfo

GPTQ, AWQ, MLX = (formats.get(name) for name in ("gptq", "awq", "mlx"))
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True, kw_only=True)
class InMemory(Checkpoint):
    """A folder of tensors that lie nowhere."""

    values: dict[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, config: dict[str, Any], values: dict[str, torch.Tensor]) -> InMemory:
        headers = ((name, safetensors_dtype(t.dtype), tuple(t.shape), t.nbytes) for name, t in values.items())
        infos = {header[0]: TensorInfo(*header, "x") for header in headers}
        return cls(Path("/x"), config, infos, ("x",), (), values=values)

    def read(self, name: str) -> torch.Tensor:
        return self.values[name]

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.values[name][start:stop]


def words(codes: list[int], bits: int) -> list[int]:
    """A stream of codes from 0, as signed words: written out as one large integer."""
    whole = sum(code << i * bits for i, code in enumerate(codes))
    unsigned = [whole >> 32 * i & 0xFFFFFFFF for i in range(len(codes) * bits // 32)]
    return [word - (1 << 32) if word >> 31 else word for word in unsigned]


def some(name: str, shape: tuple[int, int] = (32, 64), seed: int = 0) -> QTensor:
    scheme, draw = parse(name), torch.Generator().manual_seed(seed)
    codes = torch.randint(scheme.levels.lo, scheme.levels.hi + 1, shape, generator=draw)
    grid = scheme.scale_shape(shape)
    scale = (torch.rand(grid, generator=draw) + 0.5).half()
    zero = codes[:, : grid[1]].to(torch.int8) if scheme.zero else None
    low = (torch.rand(grid, generator=draw) - 0.5).half() if scheme.min else None
    dtype = torch.int8 if scheme.levels.lo < 0 else torch.uint8
    if scheme.scale == "float32":  # which 16 bits do not hold
        scale, low = scale.float() * (1 + 2**-20), None if low is None else low.float()
    return QTensor(scheme, codes.to(dtype), scale, zero, low)


def laid_out(fmt: formats.Format, q: QTensor) -> tuple[StoredTensor, dict[str, torch.Tensor]]:
    stored = fmt.prepared({"a": StoredTensor("a", q.scheme, q.shape)})["a"]
    tensors = fmt.encode(stored, q)
    promised = {name: (BY_SAFETENSORS[dtype], shape) for name, (dtype, shape) in fmt.layout(stored).items()}
    assert promised == {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    return stored, tensors


# ---- golden bytes ----------------------------------------------------------------------------------------------------


def test_one_word_of_each_by_hand() -> None:
    """Codes 0..7 (from 0) along the axis that is packed."""
    codes = torch.arange(8, dtype=torch.int8)[None].repeat(8, 1) - 8
    down = QTensor(parse("w4"), codes, torch.ones(8, 1, dtype=torch.float16))
    across = QTensor(parse("w4"), codes.t().contiguous(), torch.ones(8, 1, dtype=torch.float16))
    tensors = laid_out(GPTQ, down)[1]
    assert tensors["a.qweight"].tolist() == [[0x76543210] * 8]
    assert tensors["a.qzeros"].tolist() == [[0x77777777]]  # v1: one less than 8
    assert tensors["a.g_idx"].tolist() == [0] * 8
    assert laid_out(MLX, down)[1]["a.weight"].tolist() == [[0x76543210]] * 8
    tensors = laid_out(AWQ, across)[1]
    assert tensors["a.qweight"].tolist() == [[0x75316420]] * 8
    assert tensors["a.qzeros"].view(torch.uint32).tolist() == [[0x88888888]]


@pytest.mark.parametrize("name", ["w2g32", "w3g32", "w4g32", "w4", "w8g32", "w2g32z", "w3z", "w4g32z", "w8g32z"])
def test_gptq_is_what_its_description_says(name: str) -> None:
    q = some(name)
    stored, tensors = laid_out(GPTQ, q)
    bits, middle = q.scheme.bits, 2 ** (q.scheme.bits - 1)
    for row in (0, 31):
        assert tensors["a.qweight"][:, row].tolist() == words([int(c) + middle for c in q.codes[row]], bits)
    zero = torch.zeros(q.plain_scale.shape, dtype=torch.int8) if q.zero is None else q.zero
    less = 0 if q.scheme.zero else 1  # v2 where there are zero points: v1's 0 wraps around
    assert stored.variant == ("gptq_v2" if q.scheme.zero else "gptq")
    assert tensors["a.qzeros"][0].tolist() == words([int(z) + middle - less for z in zero[:, 0]], bits)
    assert torch.equal(tensors["a.scales"], q.plain_scale.t())
    assert tensors["a.g_idx"].tolist() == [k // (q.scheme.group_columns or 64) for k in range(64)]


@pytest.mark.parametrize("name", ["w4g32", "w4", "w4g32z"])
def test_awq_is_what_its_description_says(name: str) -> None:
    q = some(name)
    tensors = laid_out(AWQ, q)[1]
    for column in (0, 63):
        wanted = [int(q.codes[8 * w + AWQ_ORDER[j], column]) + 8 for w in range(4) for j in range(8)]
        assert tensors["a.qweight"][column].tolist() == words(wanted, 4)
    zero = torch.zeros(q.plain_scale.shape, dtype=torch.int8) if q.zero is None else q.zero
    wanted = [int(zero[8 * w + AWQ_ORDER[j], 0]) + 8 for w in range(4) for j in range(8)]
    assert tensors["a.qzeros"][0].tolist() == words(wanted, 4)


@pytest.mark.parametrize("name", ["w2g32", "w3g32", "w4g64", "w5g32", "w6g32", "w8g64", "w4g32z", "w2g32h", "w4g32m"])
def test_mlx_is_what_its_description_says(name: str) -> None:
    q = some(name)
    tensors = laid_out(MLX, q)[1]
    lowest = q.scheme.levels.lo
    for row in (0, 31):
        assert tensors["a.weight"].view(torch.int32)[row].tolist() == words(
            [int(c) - lowest for c in q.codes[row]], q.scheme.bits
        )
    codes = q.codes.float() - lowest
    size = q.scheme.group_columns
    assert size is not None
    scales, biases = (tensors[f"a.{part}"].double().repeat_interleave(size, 1) for part in ("scales", "biases"))
    assert torch.equal(codes.double() * scales + biases, codec.decode(q).double())  # nothing is rounded


def test_mlx_small_floats_are_streams_of_their_bits() -> None:
    q = codec.encode(torch.randn(4, 64, generator=torch.Generator().manual_seed(0)), parse("mxfp4"))
    tensors = laid_out(MLX, q)[1]
    assert tensors["a.weight"].view(torch.int32)[1].tolist() == words(q.codes[1].tolist(), 4)
    assert isinstance(q.scale, torch.Tensor)
    assert torch.equal(tensors["a.scales"], q.scale.view(torch.uint8))


# ---- there and back --------------------------------------------------------------------------------------------------

CONFIGS = {
    "gptq": {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}},
    "awq": {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}},
    "mlx": {"quantization": {"group_size": 32, "bits": 4}},
}


def read(fmt: formats.Format, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> QTensor:
    checkpoint = InMemory.of(config, tensors)
    assert formats.of_folder(checkpoint) is fmt
    [stored] = fmt.contents(checkpoint).values()
    q = fmt.decode(stored, {name: tensors[name] for name in fmt.layout(stored)})
    undecoded = fmt.undecoded(stored, tensors)
    assert undecoded is None or torch.equal(codec.decode(undecoded.qtensor()), codec.decode(q))
    return q


@pytest.mark.parametrize(
    ("format_name", "name"),
    [("gptq", name) for name in ("w2g32", "w3g32", "w4g32", "w4", "w8g32", "w2g32z", "w3z", "w4g32z", "w8g32z")]
    + [("awq", name) for name in ("w4g32", "w4", "w4g32z")]
    + [("mlx", name) for name in ("w2g32", "w3g64", "w4g32", "w5g32", "w6g32", "w8g64", "w4g32z", "w8g32z", "w2g32h",
                                  "w4g32m", "w8g32m", "mxfp4", "w4g64mf")],
)  # fmt: skip
def test_what_is_written_is_read_again(format_name: str, name: str) -> None:
    fmt = formats.get(format_name)
    q = codec.encode(torch.randn(32, 64), parse(name)) if name == "mxfp4" else some(name)
    stored, tensors = laid_out(fmt, q)
    config = fmt.config({"model_type": "x"}, {"a": stored}, Reading())
    again = read(fmt, json.loads(json.dumps(config)), tensors)
    assert again.scheme == q.scheme
    assert torch.equal(again.codes, q.codes)
    for part in ("scale", "zero", "min"):
        one, other = getattr(again, part), getattr(q, part)
        assert (one is None) == (other is None)
        assert one is None or (one.dtype == other.dtype and torch.equal(one.float(), other.float()))
    assert fmt.float_config(config) == {"model_type": "x"}


def test_zero_points_of_the_first_version_are_read_one_higher() -> None:
    """And a zero of 0, which is stored as 15, as 0."""
    q = some("w4g32z")
    _, tensors = laid_out(GPTQ, q)
    assert q.zero is not None
    stored = (q.zero.t() + 8 - 1) % 16
    assert 15 in stored
    tensors["a.qzeros"] = torch.tensor([words(row, 4) for row in stored.tolist()], dtype=torch.int32)
    again = read(GPTQ, CONFIGS["gptq"], tensors)
    assert again.zero is not None
    assert torch.equal(again.zero, q.zero)
    without = {name: tensor for name, tensor in tensors.items() if not name.endswith("g_idx")}
    assert torch.equal(codec.decode(read(GPTQ, CONFIGS["gptq"], without)), codec.decode(q))


def test_blocks_in_act_order_are_read_and_scattered_inputs_are_refused() -> None:
    q = some("w4g32z", (32, 128))
    _, tensors = laid_out(GPTQ, q)
    version = {"quantization_config": {**CONFIGS["gptq"]["quantization_config"], "checkpoint_format": "gptq_v2"}}
    assert q.zero is not None
    order = torch.tensor([3, 0, 1, 2, 2, 1, 3, 0]).repeat_interleave(16)  # groups of 32 in pieces of 16
    again = read(GPTQ, version, {**tensors, "a.g_idx": order.int()})
    assert again.scheme == parse("w4g16z")
    wanted = (q.codes.float() - q.zero.float()[:, order]) * q.plain_scale.float()[:, order]
    assert torch.equal(codec.decode(again), wanted)
    scattered = torch.arange(128).flip(0)[torch.randperm(128, generator=torch.Generator().manual_seed(1))] // 32
    with pytest.raises(CheckpointError, match=r": a has its inputs in act-order.*static_groups"):
        read(GPTQ, version, {**tensors, "a.g_idx": scattered.int()})


def test_biases_that_are_no_multiples_become_minima() -> None:
    q = some("w4g32z")
    _, tensors = laid_out(MLX, q)
    tensors["a.biases"] = tensors["a.biases"].clone()
    tensors["a.biases"][31, 1] *= 1 + 2**-20  # one of them, in the last row
    again = read(MLX, CONFIGS["mlx"], tensors)
    assert again.scheme == parse("w4g32mf")  # 16 bits do not hold it
    size = again.codes.float().reshape(32, 2, 32)
    wanted = size * tensors["a.scales"][..., None] + tensors["a.biases"][..., None]
    assert torch.equal(codec.decode(again), wanted.reshape(32, 64))
    narrow = {**tensors, "a.scales": tensors["a.scales"].bfloat16(), "a.biases": tensors["a.biases"].bfloat16()}
    assert read(MLX, CONFIGS["mlx"], narrow).scheme == parse("w4g32m")


def test_entries_of_modules_count_more_than_the_section() -> None:
    q, other = some("w4g32"), some("w8g64", seed=1)
    tensors = laid_out(MLX, q)[1] | {
        name.replace("a.", "b."): tensor for name, tensor in laid_out(MLX, other)[1].items()
    }
    stored = {"a": StoredTensor("a", q.scheme, q.shape), "b": StoredTensor("b", other.scheme, other.shape)}
    stored["c"] = replace(stored["a"], module="c")
    config = MLX.config({}, stored, Reading())
    assert config["quantization"] == config["quantization_config"] == {
        "group_size": 32, "bits": 4, "mode": "affine", "b": {"group_size": 64, "bits": 8, "mode": "affine"},
    }  # fmt: skip
    read_off = MLX.contents(InMemory.of(config, tensors))
    assert {module: one.scheme.name for module, one in read_off.items()} == {"a": "w4g32", "b": "w8g64"}


def test_layers_that_stay_float_within_a_block_are_excepted_by_name() -> None:
    """By a negative pattern for gptqmodel and vLLM, by a list of the others for optimum, and in full for AWQ."""
    stored = {f"m.{i}.mlp.up": StoredTensor(f"m.{i}.mlp.up", parse("w4g32"), (32, 64)) for i in range(2)}
    reading = Reading(["lm_head", "m.0.mlp.gate"])
    section = GPTQ.config({}, GPTQ.prepared(stored), reading)["quantization_config"]
    assert section["dynamic"] == {r"-:^m\.0\.mlp\.gate$": {}}
    assert section["modules_in_block_to_quantize"] == [["mlp.up"]]
    assert "dynamic" not in GPTQ.config({}, GPTQ.prepared(stored), Reading(["lm_head"]))["quantization_config"]
    awq = AWQ.config({}, AWQ.prepared(stored), reading)["quantization_config"]
    assert awq["modules_to_not_convert"] == ["lm_head", "m.0.mlp.gate"]


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format_name", "change", "rule"),
    [
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        ("gptq", {"bits": 5}, "bits is 5"),
        ("gptq", {"bits": "4"}, "bits is '4'"),
        ("gptq", {"pack_dtype": "int8"}, "pack_dtype 'int8'"),
        ("awq", {"version": "gemv"}, "version 'gemv'"),
        ("awq", {"bits": 8}, "bits is 8"),
        ("mlx", {"mode": "mxfp8"}, "mode 'mxfp8'"),
        ("mlx", {"group_size": 0}, "groups of 0"),
    ],
)
def test_variants_are_refused_by_their_word(format_name: str, change: dict[str, Any], rule: str) -> None:
    fmt, config = formats.get(format_name), copy.deepcopy(CONFIGS[format_name])
    next(iter(config.values())).update(change)
    tensors = laid_out(fmt, some("w4g32"))[1]
    with pytest.raises(CheckpointError, match=rule):
        fmt.contents(InMemory.of(config, tensors))


JUNK: list[Any] = [
    None, True, -1, 0, 3, 4, 33, 1 << 40, 4.0, "4", "", [], [4], {}, {"a": 1}, "gptq_v2", "affine", "mxfp4", "nvfp4",
]  # fmt: skip
TYPES = [torch.float32, torch.int32, torch.uint8, torch.float16, torch.int64]


def mutated(draw: random.Random, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> InMemory:
    """One or two faults: a value of the config, a tensor gone, cut, of another type or shape, or with other bytes."""
    config, tensors = copy.deepcopy(config), dict(tensors)
    for _ in range(draw.choice((1, 1, 2))):
        name = draw.choice(sorted(tensors))
        tensor = tensors[name]
        fault = draw.randrange(7)
        if fault == 0:
            section = next(iter(config.values()))
            section[draw.choice([*section, "mode", "a", "desc_act", "checkpoint_format"])] = draw.choice(JUNK)
        elif fault == 1 and len(tensors) > 1:
            del tensors[name]
        elif fault == 2:
            tensors[name] = tensor[: draw.randrange(len(tensor) + 1)]
        elif fault == 3:
            tensors[name] = tensor.reshape(draw.choice([(-1,), (1, -1), (-1, 1), (*tensor.shape, 1)]))
        elif fault == 4:
            tensors[name] = tensor.to(draw.choice(TYPES))
        elif fault == 5:
            tensors[draw.choice([f"b.{name.partition('.')[2]}", "a.bias", "b.scales", ".qweight"])] = tensor
        else:
            raw = tensor.clone().contiguous().view(torch.uint8).reshape(-1)
            if raw.numel():
                for _ in range(draw.randrange(1, 9)):
                    raw[draw.randrange(len(raw))] = draw.randrange(256)
                tensors[name] = raw.view(tensor.dtype).reshape(tensor.shape)
    return InMemory.of(config, tensors)


@pytest.mark.parametrize("format_name", ["gptq", "awq", "mlx"])
@pytest.mark.parametrize("name", ["w4g32z", "w4g32"])
def test_mutated_folders_end_in_a_named_error_or_in_numbers(format_name: str, name: str) -> None:
    fmt, draw = formats.get(format_name), random.Random(f"{format_name} {name}")
    tensors = laid_out(fmt, some(name))[1]
    refused = 0
    for _ in range(500):
        checkpoint = mutated(draw, CONFIGS[format_name], tensors)
        try:
            if formats.of_folder(checkpoint) is not fmt:
                continue
            for stored in fmt.contents(checkpoint).values():
                q = fmt.decode(stored, {part: checkpoint.read(part) for part in fmt.layout(stored)})
                assert q.shape == stored.shape
                assert bool(torch.isfinite(codec.decode(q)).all())
                fmt.undecoded(stored, checkpoint.values)
        except SpicerackError as error:
            assert error.message.startswith(("/x", "a.", "a:", "b.", "b:", ".")), error.message
            refused += 1
    assert refused > 100
