"""Fake quantization in C++ against torch's operations: the same bits, and where the latter take over."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from spicerack.errors import ShapeError
from spicerack.numerics import fake as module
from spicerack.numerics import fake_native, native
from spicerack.numerics.fake import Clip, Grid, Parts, fake, fake_linear
from spicerack.numerics.fake_native import Operands
from spicerack.numerics.levels import IntLevels

TYPES = [torch.float32, torch.float16, torch.bfloat16]
LEVELS = [IntLevels(-8, 7), IntLevels(-128, 127), IntLevels(0, 15), IntLevels(-2, 1, half=True), IntLevels(-1, 1)]
ODD = [float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1e-41, 1e30, 0.25, -0.75]
BITS = {2: torch.int16, 4: torch.int32}


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Bit for bit, signs of zeros too; but any NaN is like another."""
    if a is None or b is None:
        return a is b
    if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(a.isnan(), b.isnan()):
        return False
    kind = BITS[a.element_size()]
    return torch.equal(a.nan_to_num(0).view(kind), b.nan_to_num(0).view(kind))


def parts_of(shape: tuple[int, int], levels: IntLevels, zero: bool, random: torch.Generator) -> Parts:
    scale = torch.rand(shape, generator=random) * 0.3 + 0.02
    scale[torch.rand(shape, generator=random) < 0.2] *= -1
    scale.view(-1)[0] = 0.5  # some weights are in the middle between two levels
    return scale, torch.randint(levels.lo, levels.hi + 1, shape, generator=random).float() if zero else None


@settings(deadline=None, max_examples=150)
@given(
    st.integers(0, 2**31), st.tuples(st.integers(1, 4), st.integers(1, 4)), st.integers(1, 4), st.integers(1, 70),
    st.sampled_from(LEVELS), st.booleans(), st.sampled_from(["levels", "cells"]),
    st.sampled_from(TYPES), st.sampled_from(TYPES), st.sampled_from(TYPES),
)  # fmt: skip
def test_the_bits_are_torchs(
    seed: int,
    groups: tuple[int, int],
    rows: int,
    columns: int,
    levels: IntLevels,
    zero: bool,
    clip: Clip,
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> None:
    random = torch.Generator().manual_seed(seed)
    w, grad = torch.randn((2, groups[0] * rows, groups[1] * columns), generator=random)
    places = torch.randint(0, w.numel(), (len(ODD),), generator=random)
    w.view(-1)[places] = torch.tensor(ODD)
    grad.view(-1)[places.roll(1)] = torch.tensor(ODD)
    w, grad = w.to(dtype), grad.to(grad_dtype)
    grid = Grid(levels, (rows, columns), clip)
    parts = parts_of(groups, levels, zero and not levels.half, random)
    rounded = grid.decode(grid.round(grid.places(w, parts)), parts).to(out_dtype)
    wanted = (True, True, parts[1] is not None)
    by_weight, by_scale, by_zero = grid._sums(grad, w, parts, wanted)
    operands = Operands(w, levels, grid.group, *parts)
    for isa in native.ISAS:
        assert same(fake_native.fake(operands, out_dtype, isa=isa), rounded)
        ours = fake_native.gradients(
            grad.clone(), operands, cells=clip == "cells", needed=wanted, rounded=out_dtype, spare=True, isa=isa
        )
        assert same(ours[0], by_weight) and same(ours[3], rounded)
        for sums, theirs in zip(ours[1:3], (by_scale, by_zero), strict=True):
            assert (sums is None) == (theirs is None)
            if sums is not None and theirs is not None:
                assert torch.allclose(sums, theirs, rtol=1e-5, atol=1e-3, equal_nan=True)


def test_sums_over_long_groups_are_those_of_float64() -> None:
    w, grad = torch.randn(2, 5, 70_001)
    grid, parts = Grid(IntLevels(-8, 7), (5, 70_001)), (torch.full((1, 1), 0.1), torch.full((1, 1), 3.0))
    exact = grid._sums(grad.double(), w, parts, (True, True, True))  # float32 inside: of the products alone
    u = grid.places(w, parts)
    codes = grid.round(u)
    inside = (u >= -8) & (u <= 7)
    by_scale = ((codes - torch.where(inside, u, 3.0)).double() * grid.tiles(grad)).sum()
    by_zero = -(grid.tiles(grad).double() * ~inside).sum()
    operands = Operands(w, grid.levels, grid.group, *parts)
    ours = fake_native.gradients(grad, operands, cells=False, needed=(True, True, True))
    assert exact[0] is not None and ours[1] is not None and ours[2] is not None
    assert float(ours[1]) == pytest.approx(float(by_scale), rel=1e-5)
    assert float(ours[2]) == pytest.approx(float(by_zero), rel=1e-5)


@pytest.mark.parametrize("group", [(1, 32), (2, 100), (1, 800), (400, 800)])
def test_threads_change_nothing(group: tuple[int, int], threads: None) -> None:
    w, grad = torch.randn(2, 400, 800)
    grid = Grid(IntLevels(-8, 7), group)
    parts = parts_of((400 // group[0], 800 // group[1]), grid.levels, True, torch.Generator().manual_seed(0))
    results = []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        results.append([grid.fake(w, parts), *grid.gradients(grad, w, parts, (True, True, True))])
    assert all(same(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_only_what_is_needed() -> None:
    w, grad = torch.randn(2, 4, 16)
    grid, scale = Grid(IntLevels(-8, 7), (1, 16)), torch.full((4, 1), 0.2)
    for needed in [(True, False, False), (False, True, False), (False, False, True)]:
        gradients = grid.gradients(grad, w, (scale, torch.zeros(4, 1)), needed)
        assert [one is not None for one in gradients] == [*needed, False]


def test_gradients_that_others_may_hold_stay() -> None:
    w, grad = torch.randn(2, 4, 16)
    kept = grad.clone()
    grid, parts = Grid(IntLevels(-2, 1), (1, 16)), (torch.full((4, 1), 0.2), None)
    by_weight = grid.gradients(grad, w, parts, (True, True, False))[0]
    assert same(grad, kept) and not same(by_weight, kept)
    spared = grid.gradients(grad, w, parts, (True, True, False), spare=True)[0]
    assert spared is grad and same(spared, by_weight)


def test_strided_weights_and_gradients() -> None:
    w, scale = torch.randn(32, 12).t(), torch.rand(12, 4) + 0.1
    grid = Grid(IntLevels(-8, 7), (1, 8))
    grad = torch.ones(1, 1).expand(12, 32)
    expected = grid._sums(grad, w, (scale, None), (True, True, False))
    operands = Operands(w, grid.levels, grid.group, scale, None)
    by_weight = fake_native.gradients(grad, operands, cells=False, needed=(True, True, False))[0]
    assert same(by_weight, expected[0])
    assert same(grid.fake(w, (scale.t().contiguous().t(), None)), grid.fake(w.contiguous(), (scale, None)))


def test_defaults_of_types_and_devices_change_nothing() -> None:
    w = torch.randn(4, 16)
    grid, parts = Grid(IntLevels(-8, 7), (1, 16)), (torch.full((4, 1), 0.2), None)
    wanted = [grid.fake(w, parts), *grid.gradients(w, w, parts, (True, True, False))]
    with torch.device("meta"):
        results = [grid.fake(w, parts), *grid.gradients(w, w, parts, (True, True, False))]
    assert all(same(a, b) for a, b in zip(results, wanted, strict=True))


def test_parts_of_another_shape_or_type_are_refused() -> None:
    w = torch.randn(4, 16)
    for scale in (torch.ones(4, 2), torch.ones(4, 1).half()):
        with pytest.raises(ShapeError, match=r"weights \[4, 16\] in blocks \[1, 16\]: scales"):
            fake_native.fake(Operands(w, IntLevels(-8, 7), (1, 16), scale, None))


# ---- who computes ----------------------------------------------------------------------------------------------------


class _Other(torch.Tensor):
    pass


@pytest.mark.parametrize("x", [torch.float32, torch.bfloat16])
def test_products_take_weights_in_their_type(x: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """And training is the same whoever computes."""
    torch.manual_seed(0)
    w, bias = torch.randn(24, 64, requires_grad=True), torch.randn(24, requires_grad=True)
    scale = (torch.rand(24, 2) * 0.2 + 0.1).requires_grad_()
    given, outer = torch.randn(3, 5, 64).to(x).requires_grad_(), torch.randn(3, 5, 24).to(x)
    grid = Grid(IntLevels(-8, 7), (1, 32))

    def step() -> list[torch.Tensor]:
        y = fake_linear(given, w, (scale, None), bias, grid)
        return [y, *torch.autograd.grad(y, [given, w, bias, scale], outer)]

    ours = step()
    monkeypatch.setattr(module, "_natively", lambda *_: False)
    theirs = step()
    assert all(same(a, b) for a, b in zip(ours[:-1], theirs[:-1], strict=True))
    assert torch.allclose(ours[-1], theirs[-1], atol=1e-5)


def test_torch_computes_what_others_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []
    real = fake_native.fake
    monkeypatch.setattr(fake_native, "fake", lambda *given: called.append(1) or real(*given))
    grid, scale = Grid(IntLevels(-8, 7), (1, 16)), torch.full((4, 1), 0.2)
    w = torch.randn(4, 16)
    assert same(grid.fake(w, (scale, None)), grid.fake(nn.Parameter(w), (scale, None)).detach())
    assert len(called) == 1  # the parameter's gradient would have been lost
    fake(nn.Parameter(w), (scale, None), grid)
    assert len(called) == 2  # which the function has
    grid.fake(w.as_subclass(_Other), (scale, None))
    grid.fake(w.double(), (scale, None))
    grid.fake(w.to("meta"), (scale.to("meta"), None))
    grid.fake(w, (scale, None), torch.float64)
    again = grid.gradients(w, w, (scale, None), (True, False, False), rounded=torch.float64)[3]
    assert again is not None and again.dtype == torch.float64
    torch.compile(lambda w: grid.fake(w, (scale, None)), backend="eager", fullgraph=True)(w)
    torch.compiler.reset()
    assert len(called) == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_has_the_operations() -> None:
    grid, scale = Grid(IntLevels(-8, 7), (1, 16)), torch.full((4, 1), 0.2)
    traced = torch.jit.trace(lambda w: grid.fake(w, (scale, None)), torch.randn(4, 16))
    w = torch.randn(4, 16)
    assert same(traced(w), grid.fake(w, (scale, None)))


def test_gradients_of_gradients() -> None:
    """w^ is piecewise linear in w, and the gradient of w that of w^ where nothing is clipped."""
    w, scale = torch.tensor([[0.3, 9.0]], requires_grad=True), torch.tensor([[0.5]])
    outer = torch.tensor([[2.0, 3.0]], requires_grad=True)
    [by_weight] = torch.autograd.grad(
        fake(w, (scale, None), Grid(IntLevels(-2, 1), (1, 2))), w, outer, create_graph=True
    )
    [twice] = torch.autograd.grad(by_weight.sum(), outer)
    assert twice.tolist() == [[1.0, 0.0]]
