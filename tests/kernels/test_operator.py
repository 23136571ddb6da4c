"""The native kernels inside torch: traced, exported, differentiated, copied, and given what they cannot take."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from spicerack.errors import ShapeError
from spicerack.kernels import multiply, torch_op
from spicerack.kernels.kernel import Compute
from spicerack.kernels.multiply import PanelMatrix
from spicerack.nn.linear import QLinear
from spicerack.numerics import codec
from spicerack.numerics.qtensor import QTensor
from spicerack.numerics.scheme import parse

pytestmark = pytest.mark.slow

SCHEMES = ["w8", "w4g32z", "w3g64", "w2g32h", "w8a8", "w4g32za8s", "w4g32m", "q2_k"]
N, K = 24, 64


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantized(scheme: str, n: int = N, k: int = K, seed: int = 1) -> QTensor:
    q = codec.encode(values(n, k, seed=seed), parse(scheme), range_="absmax")
    return dataclasses.replace(q, input_scale=torch.tensor([0.02])) if scheme.endswith("s") else q


def layer(
    scheme: str, n: int = N, k: int = K, *, bias: bool = True, compute: Compute | None = None, seed: int = 1
) -> QLinear:
    own = nn.Parameter(values(n, seed=seed + 1)) if bias else None
    return QLinear.of(quantized(scheme, n, k, seed), own, compute=compute)


def parts(m: PanelMatrix) -> tuple[torch.Tensor | None, ...]:
    return m.codes, m.scale, m.zero, m.outer


def net(bias: bool = True) -> nn.Sequential:
    """Widths that are no multiples of a panel, several schemes, a torch layer in between."""
    between = nn.LayerNorm(N)
    return nn.Sequential(layer("w4g32z", bias=bias), nn.GELU(), between, layer("w8", 40, N, bias=bias, seed=5)).eval()


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# ---- the operator ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("compute", ["int8", "float"])
def test_schema_shapes_and_gradients_are_what_torch_expects(scheme: str, compute: Compute, dtype: torch.dtype) -> None:
    k = 256 if scheme == "q2_k" else K
    matrix = layer(scheme, k=k, compute=compute).packed.prepared()
    for grad, bias in ((False, None), (True, values(N).to(dtype).requires_grad_())):
        x = values(2, 3, k).to(dtype).requires_grad_(grad)
        tensors = (*parts(matrix), bias, matrix.input_scale)
        arguments = (x, *tensors, *matrix.spec, 0, matrix.activations)
        torch.library.opcheck(torch_op.OPERATOR, arguments)
        grad_y = values(2, 3, N).to(dtype).requires_grad_(grad)
        torch.library.opcheck(torch_op.TRANSPOSED, (grad_y, *parts(matrix), *matrix.spec))


def test_every_way_through_the_dispatcher_gives_the_same_bits() -> None:
    small, x = layer("w4g32z"), values(5, K)
    m, bias = small.packed.prepared(), small.bias
    assert bias is not None

    def operator(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch_op.OPERATOR(x, *parts(m), bias, None, *m.spec, 0, m.activations)

    expected = multiply.multiply(x, (m,), (bias,), 0)[0]
    assert torch.equal(operator(x, bias), expected) and operator(x, bias).requires_grad
    assert torch.equal(operator(x.clone().requires_grad_(), bias.detach()), expected)
    with torch.no_grad():
        assert torch.equal(operator(x, bias), expected) and not operator(x, bias).requires_grad
    with torch.inference_mode():
        assert torch.equal(operator(x.clone(), bias), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(operator(x, bias), expected)


# ---- compiled and exported -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_equals_eager_for_any_batch(dtype: torch.dtype, bias: bool) -> None:
    model, frames = net(bias).to(dtype), 0

    def counting(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        nonlocal frames
        frames += 1
        return graph

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    counted = torch.compile(copy.deepcopy(model), fullgraph=True, backend=counting, dynamic=True)
    with torch.no_grad():
        for rows in (2, 5, 17, 64):
            x = values(rows, K, seed=rows).to(dtype)
            assert torch.equal(compiled(x), model(x))
            assert torch.equal(counted(x), model(x))
    assert frames == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inductor_is_within_rounding_of_eager() -> None:
    """Its own LayerNorm and GELU sum in another order; an int8 activation may move by a step."""
    model = net()
    alone = nn.Sequential(layer("w4g32z"))
    with torch.no_grad():
        for rows in (3, 16):
            x = values(rows, K, seed=rows)
            assert torch.equal(torch.compile(alone, fullgraph=True, dynamic=True)(x), alone(x))
            y = torch.compile(model, fullgraph=True, dynamic=True)(x)
            assert torch.allclose(y, model(x), atol=0.05) and y.shape == (rows, 40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_an_exported_program_equals_eager(dtype: torch.dtype, bias: bool) -> None:
    model = net(bias).to(dtype)
    batch = torch.export.Dim("batch", min=2, max=512)
    program = torch.export.export(model, (values(4, K).to(dtype),), dynamic_shapes=({0: batch},))
    targets = [node.target for node in program.graph.nodes]
    assert targets.count(torch_op.OPERATOR) == 2
    with torch.no_grad():
        for rows in (2, 33):
            x = values(rows, K, seed=rows).to(dtype)
            assert torch.equal(program.module()(x), model(x))


@pytest.mark.parametrize("scheme", ["w4g32z", "w8a8", "iq4_nl", "nvfp4"])
def test_gradients_through_a_compiled_layer_are_the_dense_ones(scheme: str) -> None:
    small = layer(scheme)
    compiled = torch.compile(small, fullgraph=True, backend="aot_eager")
    grad = values(5, N, seed=9)
    assert small.bias is not None
    gradients = []
    for model in (small, compiled):
        x = values(5, K, seed=3).requires_grad_()
        small.bias.grad = None
        model(x).backward(grad)
        assert x.grad is not None and small.bias.grad is not None
        gradients.append((x.grad, small.bias.grad))
    assert all(torch.equal(eager, traced) for eager, traced in zip(*gradients, strict=True))
    assert torch.allclose(gradients[1][0], grad @ small.weight, rtol=1e-5, atol=1e-5)
    assert torch.allclose(gradients[1][1], grad.sum(0), rtol=1e-5, atol=1e-5)


def test_second_derivatives_are_the_dense_ones() -> None:
    small = layer("w4g32z", bias=False, compute="float")
    weight, second = small.weight, []
    for product in (small, lambda x: nn.functional.linear(x, weight)):
        x = values(5, K, seed=3).requires_grad_()
        (first,) = torch.autograd.grad(product(x).pow(3).sum(), x, create_graph=True)
        second.append(torch.autograd.grad(first.square().sum(), x)[0])
    assert torch.allclose(second[0], second[1], rtol=1e-3, atol=1e-3 * float(second[1].abs().max()))


def test_only_the_bias_may_want_a_gradient() -> None:
    small, x = layer("w4g32"), values(5, K)
    small(x).sum().backward()
    assert small.bias is not None and torch.equal(small.bias.grad, torch.full((N,), 5.0))
    assert x.grad is None


# ---- inputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64])
def test_the_engine_names_a_type_that_it_does_not_take(dtype: torch.dtype) -> None:
    matrix = layer("w4g32").packed.prepared()
    with pytest.raises(TypeError, match=str(dtype)):
        multiply.multiply(torch.zeros(2, K, dtype=dtype), (matrix,), (None,), 0)


def test_float64_is_rounded_on_the_way_in_and_keeps_its_type() -> None:
    small, x = layer("w4g32"), values(3, K)
    y = small(x.double())
    assert y.dtype == torch.float64 and torch.equal(y, small(x).double())


def test_biases_of_another_type_outlive_the_call() -> None:
    """Each is converted, and its address handed on; with several at once the first must not be freed before that."""
    matrices = [layer("w8", seed=seed).packed.prepared() for seed in range(4)]
    biases, x = [values(N, seed=seed).half() for seed in range(4)], values(3, K)
    joined = multiply.multiply(x, matrices, biases, 0)
    for matrix, bias, y in zip(matrices, biases, joined, strict=True):
        assert torch.equal(y, multiply.multiply(x, (matrix,), (bias.float(),), 0)[0])


@pytest.mark.parametrize("shape", [(3, K - 1), (3, K + 32), (K, 3), (0,), ()])
def test_a_wrong_width_is_named(shape: tuple[int, ...]) -> None:
    with torch.no_grad(), pytest.raises(ShapeError, match=rf"takes \[\.\.\., {K}\]"):
        layer("w4g32")(torch.zeros(shape))


def test_another_device_is_named() -> None:
    small = layer("w4g32", bias=False)
    with torch.no_grad(), pytest.raises(TypeError, match="meta"):
        small(torch.zeros(2, K, device="meta"))


def test_tensors_that_do_not_make_the_matrix_are_refused() -> None:
    m, x = layer("w4g32z").packed.prepared(), values(2, K)
    short = m.codes[:-1].clone(), m.scale, m.zero
    for codes, scale, zero in (
        short,
        (m.codes, m.scale[:-1].clone(), m.zero),
        (m.codes, m.scale, m.zero[:-1].clone()),
        (m.codes, m.scale.to(torch.float64), m.zero),
        (m.codes.transpose(0, 1), m.scale, m.zero),
    ):
        with pytest.raises(ShapeError, match=rf"\[{N}, {K}\] matrix of 4 bits"):
            torch_op.OPERATOR(x, codes, scale, zero, None, None, None, *m.spec, 0, m.activations)


def test_a_static_scale_that_is_none_is_refused() -> None:
    m, x = layer("w8a8s").packed.prepared(), values(2, K)
    for fixed in (None, torch.tensor([0.02], dtype=torch.float64), torch.tensor([0.02, 0.02])):
        with pytest.raises(ShapeError, match="need one float32 scale"):
            torch_op.OPERATOR(x, *parts(m), None, fixed, *m.spec, 0, m.activations)
    for value in (0.0, -1.0, torch.nan, torch.inf):
        with pytest.raises(ValueError, match="finite and above 0"):
            torch_op.OPERATOR(x, *parts(m), None, torch.tensor([value]), *m.spec, 0, m.activations)


@pytest.mark.parametrize("scheme", ["w4g32z", "w8a8", "w8a8s"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_where_x_lies_does_not_matter(scheme: str, dtype: torch.dtype) -> None:
    small, x = layer(scheme).to(dtype), values(6, K).to(dtype)
    with torch.no_grad():
        y = small(x)
        raw = bytearray(x.nbytes + 1)
        raw[1:] = x.view(torch.uint8).numpy().tobytes()
        misaligned = torch.frombuffer(raw, dtype=dtype, offset=1).view(6, K)
        assert misaligned.data_ptr() % misaligned.itemsize
        strided = torch.zeros(6, 2 * K, dtype=dtype)
        strided[:, ::2] = x
        wide = torch.zeros(6, K + 3, dtype=dtype)
        wide[:, 2:-1] = x
        for other in (misaligned, strided[:, ::2], wide[:, 2:-1], x.t().contiguous().t()):
            assert torch.equal(small(other), y) and small(other).is_contiguous()
        assert torch.equal(small(x[:1].expand(4, K)), y[:1].expand(4, N))
        assert torch.equal(small(x.view(2, 3, K).transpose(0, 1)), y.view(2, 3, N).transpose(0, 1))


def test_kernels_see_aligned_memory_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """x86 would read the rest as well; other processors, and the sanitizers, would not."""
    small, addresses = layer("w4g32"), []
    linear = multiply._native.linear
    monkeypatch.setattr(multiply._native, "linear", lambda *args: (addresses.append(args[1]), linear(*args))[1])
    raw = bytearray(4 * K + 1)
    with torch.no_grad():
        small(torch.frombuffer(raw, dtype=torch.float32, offset=1, count=K))
    assert len(addresses) == 1 and addresses[0] % 4 == 0


@pytest.mark.parametrize("compute", ["int8", "float"])
@pytest.mark.parametrize("rows", [3, 40])  # the way for few rows and the one for many
@pytest.mark.parametrize("scheme", ["w8", "w4g32z", "w2g32h", "w8a8", "w8a8s"])
def test_nan_and_infinities_stay_in_their_row(scheme: str, rows: int, compute: Compute) -> None:
    small, x = layer(scheme, compute=compute), values(rows, K)
    weight = small.weight
    with torch.no_grad():
        clean = small(x)
        for special in (torch.nan, torch.inf, -torch.inf):
            spoiled = x.clone()
            spoiled[1, 7] = special
            y = small(spoiled)
            kept = [row for row in range(rows) if row != 1]
            assert torch.equal(y[kept], clean[kept])
            product = nn.functional.linear(spoiled[1], weight)
            assert torch.equal(y[1].isnan(), product.isnan())
            infinite = product.isinf()
            assert torch.equal(y[1][infinite], product[infinite]) and not y[1].isfinite().any()


# ---- threads ---------------------------------------------------------------------------------------------------------


def test_threads_of_torch_and_ours_alternate_without_harm(threads: None) -> None:
    """Large enough for both to use a team; two Python threads call the same model at once."""
    n, inner = 128, 320
    model = nn.Sequential(
        layer("w4g32z", inner, n), nn.GELU(), nn.Linear(inner, n), layer("w8", n, n, seed=7), nn.GELU()
    ).eval()
    inputs = [values(rows, n, seed=rows) for rows in (1, 7, 64, 300)]
    results: dict[tuple[int, int], list[torch.Tensor]] = {}

    def work(count: int, caller: int) -> None:
        torch.set_num_threads(count)  # torch keeps the number for each thread
        with torch.no_grad():
            results[count, caller] = [model(x) for _ in range(5) for x in inputs]

    for count in (1, 2):
        callers = [threading.Thread(target=work, args=(count, caller)) for caller in range(2)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    assert len(results) == 4
    for count in (1, 2):
        first = results[count, 0][:4]
        assert all(
            torch.equal(y, y0)
            for ys in (results[count, 0], results[count, 1])
            for y, y0 in zip(ys, first * 5, strict=True)
        )
    # torch's own linear sums in another order on two threads
    assert all(torch.allclose(*pair, atol=1e-3) for pair in zip(results[1, 0], results[2, 0], strict=True))


def test_ours_give_the_same_bits_for_any_number_of_threads(threads: None) -> None:
    small, results = layer("w4g32z", 320, 128), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        with torch.no_grad():
            results.append([small(values(rows, 128)) for rows in (1, 8, 300)])
    assert all(torch.equal(y, y0) for ys in results for y, y0 in zip(ys, results[0], strict=True))


# ---- after it ran ----------------------------------------------------------------------------------------------------


def test_copies_of_a_layer_that_ran_stand_on_their_own() -> None:
    small, x = layer("w4g32z"), values(3, K)
    with torch.no_grad():
        y = small(x)
        for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small)), copy.copy(small.packed)):
            again = other(x) if isinstance(other, QLinear) else other(x, small.bias)
            assert torch.equal(again, y)
        other = copy.deepcopy(small)
        other.packed.codes.zero_()
        assert not torch.equal(other(x), y) and torch.equal(small(x), y)


@pytest.mark.parametrize("assign", [True, False])
def test_a_layer_that_ran_takes_another_state(assign: bool) -> None:
    small, other, x = layer("w4g32z"), layer("w4g32z", seed=20), values(3, K)
    with torch.no_grad():
        before = small(x)
        small.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
        assert torch.equal(small(x), other(x)) and not torch.equal(small(x), before)


def test_a_layer_that_ran_follows_its_tensors_to_other_memory() -> None:
    small, other, x = layer("w4g32z"), layer("w4g32z", seed=20), values(3, K)
    with torch.no_grad():
        small(x)
        for name, tensor in other.packed.tensors.items():
            small.packed.get_buffer(name).data = tensor.clone()
        small.bias.data = other.bias.data.clone()
        assert torch.equal(small(x), other(x))
