"""Every kernel against the specification: it unpacks what it packs, and multiplies x by the decoded weight."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from dropped import dropped

import spicerack
from spicerack.errors import SchemeError, ShapeError, UsageError
from spicerack.kernels import kernel, panels, table
from spicerack.kernels.table import reference
from spicerack.nn.linear import QLinear
from spicerack.numerics import codec
from spicerack.numerics.activations import quantize_tokens
from spicerack.numerics.levels import IntLevels, TableLevels
from spicerack.numerics.qtensor import QTensor, Scale
from spicerack.numerics.scheme import Scheme, parse

NAMES = [
    "w8",
    "w8t",
    "w6",
    "w5g64",
    "w4g32",
    "w4g32z",
    "w3g64",
    "w3z",
    "w2g32h",
    "w2z",
    "w8a8",
    "w4a8",
    "w4g32a8",
    "w2ha8",
    "w8a8s",
    "w4g32a8s",
    "w3za8s",
    "ternary",
    "ternarya8",
    "w4g64m",
    "w5g32mf",
    "w3m",
    "w4g16",
    "w8g16a8",
    "q4_1",
    "q5_1",
    "q2_k",
    "q3_k",
    "q4_k",
    "q5_k",
    "q6_k",
    "iq4_nl",
    "mxfp4",
    "nvfp4",
    "q1_0",
    "q2_0",
    "ternaryg256",
]
TABLE = Scheme("table", TableLevels((-1.0, 0.0, 1.0)), group=(8, 16), scale="float32", min="float16")
TERNARY_GROUPS = Scheme("ternary_groups", IntLevels(-1, 1), group=(1, 64))
SCHEMES = [*map(parse, NAMES), TABLE, TERNARY_GROUPS]
KERNELS = [row.name for row in kernel.table()]
CPU = torch.device("cpu")
FITTING = [
    pytest.param(name, scheme, id=f"{name}-{scheme}")
    for name in KERNELS
    for scheme in SCHEMES
    if kernel.get(name).obstacle(scheme, (24, 256), torch.float32, CPU) is None
]


INPUT_SCALE = torch.tensor([0.0123])  # 127 of it are 1.56: a normal input is beyond that once in eight times


def quantized(scheme: Scheme, n: int = 24, k: int | None = None) -> QTensor:
    k = k or columns(scheme)
    q = codec.encode(torch.randn(n, k, generator=torch.Generator().manual_seed(1)), scheme, range_="absmax")
    return dataclasses.replace(q, input_scale=INPUT_SCALE) if scheme.activations == "static" else q


def columns(scheme: Scheme) -> int:
    """192, or 256 where blocks need it: not whole chunks of the reference."""
    try:
        scheme.check_shape("weight", (24, 192))
    except ShapeError:
        return 256
    return 192


def run(row: kernel.Kernel, x: torch.Tensor, q: QTensor) -> torch.Tensor:
    n, k = q.shape
    return row.run(x, (row.prepare(q.scheme, (n, k), row.pack(q)),), (None,))[0]


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2)).to(dtype)


def activations(x: torch.Tensor, q: QTensor, row: kernel.Kernel) -> torch.Tensor:
    """float64 x as the row multiplies it: int8 with a scale for a token (a8), given (a8s), for 32 columns; or as is."""
    x = x.float()
    if q.input_scale is not None:
        return torch.round(x / q.input_scale).clamp(-127, 127).double() * q.input_scale.double()
    if q.scheme.activations is None and row.compute == "float":
        return x.double()
    spans = x.unflatten(-1, (-1, 32)) if q.scheme.activations is None else x[..., None, :]
    scale = spans.abs().amax(-1, keepdim=True) / 127
    inverse = 1 / torch.where(scale == 0, 1.0, scale)
    return (torch.round(spans * inverse).double() * scale.double()).flatten(-2)


def bound(x: torch.Tensor, q: QTensor) -> torch.Tensor:
    """Per element: float32 sums of K products, each rounded at most K times."""
    k = x.shape[-1]
    return 2 * k * 2**-24 * (x.double().abs() @ codec.decode(q).double().abs().t()) + 1e-30


@pytest.mark.parametrize(("name", "scheme"), FITTING)
def test_unpack_is_the_inverse_of_pack(name: str, scheme: Scheme) -> None:
    row, q = kernel.get(name), quantized(scheme)
    shape = (24, columns(scheme))
    back = row.unpack(scheme, shape, row.pack(q))
    assert torch.equal(back.codes, q.codes) and torch.equal(codec.decode(back), codec.decode(q))
    assert back.input_scale is q.input_scale is None or torch.equal(back.input_scale, INPUT_SCALE)
    for part, original in ((back.scale, q.scale), (back.min, q.min)):
        assert part is original is None or same_steps(part, original)
    assert torch.equal(row.rows(scheme, shape, row.pack(q), slice(None)), codec.decode(q))


def same_steps(part: Scale | None, original: Scale | None) -> bool:
    if isinstance(part, QTensor) and isinstance(original, QTensor):
        return torch.equal(part.codes, original.codes) and same_steps(part.scale, original.scale)
    assert isinstance(part, torch.Tensor) and isinstance(original, torch.Tensor)
    return part.dtype == original.dtype and torch.equal(part.float(), original.float())


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (0,)])
@pytest.mark.parametrize(("name", "scheme"), FITTING)
def test_products_are_within_rounding(name: str, scheme: Scheme, shape: tuple[int, ...], monkeypatch) -> None:
    monkeypatch.setattr(reference, "CHUNK", 192 * 10)  # three chunks, the last one short, groups cut through
    row, q, x = kernel.get(name), quantized(scheme), inputs(*shape, columns(scheme))
    y = run(row, x, q)
    assert y.shape == (*shape, 24) and y.dtype == x.dtype
    x = activations(x, q, row)
    assert bool(((y.double() - x @ codec.decode(q).double().t()).abs() <= bound(x, q)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weight_only_equals_the_dense_layer_in_every_type(dtype: torch.dtype) -> None:
    q, x = quantized(parse("w4g32z")), inputs(5, 192, dtype=dtype)
    row = kernel.get("reference")
    dense = torch.nn.functional.linear(x, codec.decode(q, dtype))
    assert torch.equal(run(row, x, q), dense)


def test_the_integer_product_is_exact_at_any_depth() -> None:
    """Codes as large as they get, 5000 of them: a float32 sum would round."""
    scheme, k = parse("w8a8"), 5000
    codes = torch.full((3, k), -128, dtype=torch.int8)
    codes[1:, ::7] = 127
    codes[2, ::2] = -127
    q = QTensor(scheme, codes, torch.full((3, 1), 0.5, dtype=torch.float16))
    x = torch.full((2, k), 127.0)  # scale 1
    x[1, ::3] = -126.0
    y = run(kernel.get("reference"), x, q)
    assert torch.equal(y, ((x.long() @ codes.long().t()).float() * 0.5))


def test_tokens_of_zeros_and_of_one_outlier() -> None:
    codes, scale = quantize_tokens(torch.tensor([[0.0, 0.0], [127.0, -63.4], [-1e-40, 1e-41]]))
    assert codes.tolist()[:2] == [[0.0, 0.0], [127.0, -63.0]] and scale[:2].tolist() == [[1.0], [1.0]]
    assert math.isfinite(float(codes[2].sum()))


@pytest.mark.parametrize(
    "name", [n for n in KERNELS if kernel.get(n).obstacle(parse("w8a8s"), (64, 64), torch.float32, CPU) is None]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_static_codes_are_nearest_of_the_quotient_half_to_even(name: str, dtype: torch.dtype) -> None:
    """A unit matrix shows the codes themselves: halves, their neighbours, what is clipped, by brute force."""
    scale = 0.05078125  # of a few bits: halves of codes times it are numbers of every type
    halves = torch.arange(-130.5, 131.0) * scale
    near = torch.cat([halves, *(torch.nextafter(halves, torch.tensor(end)) for end in (-9.0, 9.0))]).to(dtype)
    many = torch.cat([near, torch.tensor([1e4, -1e4, 0.0], dtype=dtype), inputs(6, 64, dtype=dtype).flatten() * 5])
    x = torch.nn.functional.pad(many, (0, -len(many) % 64)).view(-1, 64)
    codes = (64 * torch.eye(64)).to(torch.int8)
    unit = torch.full((64, 1), 2.0**-6, dtype=torch.float16)
    q = QTensor(parse("w8a8s"), codes, unit, input_scale=torch.tensor([scale]))
    expected = [max(-127, min(127, round(float(np.float32(v) / np.float32(scale))))) for v in x.flatten().tolist()]
    codes = torch.round(run(kernel.get(name), x, q).float() / scale)  # y is of x's type
    assert torch.equal(codes.flatten(), torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize(("name", "scheme"), FITTING)
def test_gradients_with_respect_to_inputs_are_the_dense_ones(name: str, scheme: Scheme, monkeypatch) -> None:
    monkeypatch.setattr(reference, "CHUNK", 192 * 10)
    row, q = kernel.get(name), quantized(scheme)
    x, grad = inputs(4, columns(scheme)).requires_grad_(), inputs(4, 24)
    run(row, x, q).backward(grad)
    assert x.grad is not None
    assert torch.allclose(x.grad, grad @ codec.decode(q), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_panels_hold_every_scheme_but_tables_of_floats(name: str) -> None:
    assert panels.obstacle(parse(name), (24, columns(parse(name))), torch.float32, CPU) is None


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        (parse("nf4"), "its levels are a table"),
        (parse("fp8"), "its levels are a table"),
        (TABLE, "its levels are a table"),
        (parse("w4g16z"), "groups of 16 have no zero points"),
        (parse("w2g16h"), "groups of 16 have no zero points or half levels"),
        (parse("w4g8"), "groups are 16 or multiples of 32, not 8"),
        (Scheme("mixed", IntLevels(0, 15), (1, 32), "float16", min="float32"), "stored in different ways"),
        (
            Scheme("wide", IntLevels(0, 15), (1, 32), Scheme("wide scales", IntLevels(0, 255), (1, 8))),
            "not to bytes with",
        ),
        (Scheme("thirds", TableLevels(tuple(i / 2 for i in range(16))), (1, 32)), "could not be halved"),
        (
            Scheme("short", IntLevels(-8, 7), (1, 16), Scheme("short scales", IntLevels(0, 63), (1, 3))),
            "multiples of 32",
        ),
    ],
    ids=str,
)
def test_what_panels_do_not_hold_is_said(scheme: Scheme, reason: str) -> None:
    assert reason in str(panels.obstacle(scheme, (24, 192), torch.float32, CPU))


def test_pick_says_why_it_passed_a_row_over() -> None:
    choice = kernel.pick(parse("w4g32"), (64, 64), torch.float32, CPU)
    assert choice.kernel.name in KERNELS and choice.kernel.name not in choice.passed_over
    with pytest.raises(SchemeError, match=r"reference: x would be torch\.int32"):
        kernel.pick(parse("w8"), (64, 64), torch.int32, CPU)


@pytest.mark.parametrize("scheme", ["w4g32", "w8", "w2g32z"])
def test_int8_is_the_default_where_vectors_exist_for_it_and_float_where_asked(scheme: str, monkeypatch) -> None:
    def chosen(compute: kernel.Compute | None) -> kernel.Kernel:
        return kernel.pick(parse(scheme), (64, 64), torch.float32, CPU, compute).kernel

    faster = panels.NAMES[: panels.engine_index()]  # than the one that --engine holds the tests to
    vector = any(
        row.vector and row.engine not in faster and row.obstacle(parse(scheme), (64, 64), torch.float32, CPU) is None
        for row in kernel.table()
    )
    assert chosen(None).compute == ("int8" if vector else "float")
    assert chosen("int8").compute == "int8" and chosen("float").compute == "float"
    slow = [row for row in kernel.table() if not row.vector]
    monkeypatch.setattr(kernel, "table", lambda: slow)
    assert chosen(None).name == "float_scalar" and chosen("int8").name == "int8_scalar"


def test_a_scheme_that_names_its_activations_has_them_with_either_compute() -> None:
    q, x = quantized(parse("w8a8")), inputs(3, 192)
    int8, exact = (QLinear.of(q, compute=compute)(x) for compute in ("int8", "float"))
    assert torch.equal(int8, exact)
    assert not torch.equal(exact, QLinear.of(quantized(parse("w8")), compute="float")(x))


def test_compute_has_two_values() -> None:
    with pytest.raises(UsageError, match="compute='int4'"):
        kernel.pick(parse("w8"), (64, 64), torch.float32, CPU, "int4")  # type: ignore[arg-type]


# ---- a new one -------------------------------------------------------------------------------------------------------

NEW_KERNEL = '''
"""A loop over rows, for whole rows of five bits."""
import torch
from spicerack.kernels.kernel import Kernel
from spicerack.numerics.qtensor import QTensor

def obstacle(scheme, shape, dtype, device):
    reason = scheme.plain_obstacle
    return reason or (None if scheme.bits == 5 and scheme.group_columns is None else "only whole rows of five bits")

def pack(q):
    return {"columns": q.codes.t().contiguous(), "steps": q.plain_scale.float()[:, 0]}

def unpack(scheme, shape, tensors):
    return QTensor(scheme, tensors["columns"].t().contiguous(), tensors["steps"][:, None].half())

def rows(scheme, shape, tensors, which):
    return (tensors["columns"].float() * tensors["steps"]).t()[which]

def prepare(scheme, shape, tensors):
    return tensors

def run(x, matrices, biases):
    ys = [x.float() @ m["columns"].float() * m["steps"] for m in matrices]
    return [(y if b is None else y + b).to(x.dtype) for y, b in zip(ys, biases, strict=True)]

KERNELS = (Kernel("loop", 1000, False, "float", obstacle, pack, unpack, rows, prepare, run),)
'''


def test_a_new_kernel_is_one_file_that_is_picked_and_multiplies(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(192, 24), torch.nn.ReLU(), torch.nn.Linear(24, 8))
    with dropped(table, tmp_path, "loop", NEW_KERNEL):
        small = spicerack.quantize(net, "w5", compute="float")
        assert [layer.packed.choice.kernel.name for layer in (small[0], small[2])] == ["loop", "loop"]
        assert not small[0].packed.choice.passed_over, "it is the fastest"
        x = inputs(5, 192)
        exact = torch.nn.functional.linear(x, codec.decode(small[0].packed.qtensor()), net[0].bias)
        assert torch.allclose(small[0](x), exact, atol=1e-5)
        assert (small(x) - net(x)).norm() < 0.1 * net(x).norm()
        other = kernel.pick(parse("w4"), (24, 192), torch.float32, CPU)
        assert other.passed_over["loop"] == "only whole rows of five bits"
        assert kernel.pick(parse("nf4"), (24, 192), torch.float32, CPU).passed_over["loop"].startswith("its levels are")
    assert kernel.pick(parse("w5"), (24, 192), torch.float32, CPU).kernel.name != "loop"
