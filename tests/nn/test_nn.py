"""Layers with packed weights behave as the float layers they replace."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import spicerack
from spicerack.nn.embedding import QEmbedding
from spicerack.nn.experts import ExpertStack, linear, put
from spicerack.nn.linear import QLinear
from spicerack.nn.weight import PackedWeight
from spicerack.numerics import codec
from spicerack.numerics.levels import TableLevels
from spicerack.numerics.qtensor import QTensor
from spicerack.numerics.scheme import Scheme, parse

pytestmark = pytest.mark.usefixtures("reference_kernel")

ROW_SCHEMES = ["w8", "w4", "w8t", "w4g32", "w4g32z", "w3g64", "w2g32h", "w5z", "table"]


TABLE = Scheme("table", TableLevels((-1.0, 0.0, 1.0)), group=(2, 16), scale="float32", min="float16")


def scheme_of(name: str) -> Scheme:
    return TABLE if name == "table" else parse(name)


def weight(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def quantized(name: str, *shape: int) -> QTensor:
    return codec.encode(weight(*shape), scheme_of(name), range_="absmax")


@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias: bool) -> None:
    q = quantized("w4g32", 48, 64)
    dense = nn.Linear(64, 48, bias=bias)
    dense.weight.data = codec.decode(q)
    layer = QLinear.of(q, dense.bias)
    x = weight(2, 3, 64)
    assert torch.equal(layer.weight, dense.weight)
    assert torch.allclose(layer(x), dense(x), atol=1e-6)
    assert (layer.in_features, layer.out_features) == (64, 48)


def test_conv1d_keeps_its_order_of_axes() -> None:
    dense = Conv1D(48, 64)
    q = codec.encode(dense.weight.data.t(), parse("w8"))
    q = QTensor(q.scheme, q.codes, q.scale, transposed=True)
    dense.weight.data = codec.decode(q)
    layer, x = QLinear.of(q, dense.bias), weight(2, 64)
    assert layer.weight.shape == (64, 48) and torch.equal(layer.weight, dense.weight)
    assert torch.allclose(layer(x), dense(x), atol=1e-6)
    assert layer.packed.qtensor().transposed


@pytest.mark.parametrize("name", ROW_SCHEMES)
def test_embedding_decodes_the_rows_asked_for(name: str) -> None:
    q = quantized(name, 50, 64)
    ids = torch.tensor([[0, 49, 7], [7, 7, 3]])
    assert torch.equal(QEmbedding.of(q)(ids), codec.decode(q)[ids])
    assert QEmbedding.of(q, dtype=torch.bfloat16)(ids).dtype == torch.bfloat16


def test_ids_out_of_range_are_refused() -> None:
    with pytest.raises(IndexError):
        QEmbedding.of(quantized("w8", 50, 64))(torch.tensor([50]))


def test_tied_layers_share_one_storage() -> None:
    packed = PackedWeight(quantized("w8", 50, 64))
    model = nn.ModuleDict({"embedding": QEmbedding(packed), "head": QLinear(packed)})
    assert len({b.data_ptr() for b in model.buffers()}) == len(list(packed.buffers()))
    assert packed.nbytes == 50 * 64 + 50 * 2


@pytest.mark.parametrize("name", ["w8", "w4g32z", "table", "w3g64"])
def test_casting_a_model_leaves_scales_alone(name: str) -> None:
    q = quantized(name, 48, 64)
    layer = QLinear.of(q, nn.Parameter(weight(48)))
    before = {key: tensor.clone() for key, tensor in layer.packed.tensors.items()}
    for cast in (layer.double, layer.half, layer.bfloat16, layer.float):
        cast()
        assert all(t.dtype == before[k].dtype and torch.equal(t, before[k]) for k, t in layer.packed.tensors.items())
    assert layer.half().bias is not None and layer.bias.dtype == torch.float16
    assert all(t.is_meta for t in layer.to("meta").packed.tensors.values())


def test_state_dict_there_and_back() -> None:
    a, b = QLinear.of(quantized("w4g32z", 48, 64)), QLinear.of(codec.encode(torch.ones(48, 64), parse("w4g32z")))
    assert not torch.equal(a.weight, b.weight)
    b.load_state_dict(a.state_dict())
    assert torch.equal(a.weight, b.weight)
    assert set(a.state_dict()) == {"packed.codes", "packed.scale", "packed.zero"}


def test_memory_is_what_the_scheme_says() -> None:
    assert PackedWeight(quantized("w4g32", 64, 256)).nbytes == parse("w4g32").stored_bits((64, 256)) // 8


def apart(owner: nn.Module, rows: tuple[int, ...], transposed: bool) -> ExpertStack:
    """The parameter `experts` of `owner` as a stack of linear layers, in its place."""
    parameter = owner.experts.detach()
    matrices = [matrix.t() if transposed else matrix for matrix in parameter]
    layers = [[linear(part) for part in matrix.split(list(rows))] for matrix in matrices]
    stack = ExpertStack(layers, parameter.shape, transposed=transposed)
    put(owner, "experts", stack)
    return stack


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_multiply_as_their_parameter_does(transposed: bool) -> None:
    """linear(x, p[e]), x @ p[e] and bmm(x, p), as families write it, before and after the parameter is taken apart."""
    owner = nn.Module()
    owner.experts = nn.Parameter(torch.randn(3, 8, 20) if transposed else torch.randn(3, 20, 8))
    x, bias, e = torch.randn(3, 5, 8), torch.randn(20), torch.tensor(1)
    functional = nn.functional.linear

    def results() -> list[torch.Tensor]:
        p = owner.experts
        if transposed:
            return [x[1] @ p[e], torch.matmul(x[1], p[e]), torch.bmm(x, p)]
        return [functional(x[1], p[e]), functional(x[1], p[e], bias), functional(x[1], p[e], bias=bias)]

    wanted, shape = results(), owner.experts.shape
    stack = apart(owner, (12, 8), transposed)
    assert owner.experts is stack and stack.shape == shape and len(stack) == 3
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(results(), wanted, strict=True))
    inputs_seen: list[torch.Tensor] = []
    stack.parts(1)[1].register_forward_pre_hook(lambda _, inputs: inputs_seen.append(inputs[0]))
    results()
    assert len(inputs_seen) == 3 and torch.equal(inputs_seen[0], x[1])


def test_what_a_stack_of_experts_cannot_answer_is_an_error() -> None:
    owner = nn.Module()
    owner.experts = nn.Parameter(torch.randn(3, 20, 8))
    stack = apart(owner, (20,), False)
    with pytest.raises(TypeError):
        torch.randn(5, 20) @ stack[0]
    with pytest.raises(TypeError):
        torch.bmm(torch.randn(3, 5, 20), stack)


@torch.no_grad()
def test_experts_multiply_in_float32_where_their_code_says_so(tmp_path: Path) -> None:
    model = tiny.build("openai_privacy_filter")
    model.save_pretrained(tmp_path / "m")
    spicerack.quantize(tmp_path / "m", "w8", output=tmp_path / "out")
    small, given = spicerack.load(tmp_path / "out", compute="float"), tiny.inputs(model)
    expected, logits = model(**given)[0], small(**given)[0]
    assert (logits - expected).norm() < 0.03 * expected.norm()


def test_a_lora_adapter_trains_on_a_packed_layer() -> None:
    q = quantized("w4g32", 48, 64)
    layer = QLinear.of(q)
    a, b = nn.Parameter(weight(4, 64)), nn.Parameter(weight(48, 4))
    x = weight(5, 64)
    for inputs, w in ((layer, None), (None, codec.decode(q))):
        h = torch.tanh(x @ a.t() @ b.t() @ codec.decode(q))
        y = inputs(h) if inputs is not None else h @ w.t()
        grads = torch.autograd.grad(y.square().sum(), (a, b))
        if w is None:
            packed_grads = grads
    assert all(torch.allclose(p, d, rtol=1e-4, atol=1e-3) for p, d in zip(packed_grads, grads, strict=True))
