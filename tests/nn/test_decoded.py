"""`.weight` of packed layers: looked at for nothing, read as the decoded tensor, and never written."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import spicerack
from spicerack.errors import UsageError
from spicerack.nn.weight import PackedLayer, PackedWeight

LAYERS = [nn.Linear(64, 48), Conv1D(48, 64), nn.Conv2d(8, 16, 4), nn.Embedding(48, 64)]


@pytest.fixture(params=LAYERS, ids=lambda layer: type(layer).__name__)
def layer(request: pytest.FixtureRequest) -> Any:
    return spicerack.quantize(request.param, "w8")


def test_what_it_is_costs_no_decoding(layer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = layer.decode()
    monkeypatch.setattr(PackedWeight, "rows", None)
    weight = layer.weight
    assert isinstance(weight, torch.Tensor) and not weight.requires_grad and not isinstance(weight, nn.Parameter)
    assert weight.shape == expected.shape == weight.size() and weight.stride() == expected.stride()
    assert weight.dtype == expected.dtype and weight.device == expected.device and weight.is_floating_point()
    assert weight.numel() == expected.numel() and weight.dim() == expected.dim() and weight.detach().data.is_cpu


def test_it_reads_as_the_decoded_tensor(layer: Any) -> None:
    weight, expected = layer.weight, layer.decode()
    for read in (
        lambda w: w.clone(), lambda w: w * 1, lambda w: w[2], lambda w: w.detach(), lambda w: w.data,
        lambda w: w.double(), lambda w: w.flatten(), lambda w: w.chunk(2)[1], copy.deepcopy,
        lambda w: pickle.loads(pickle.dumps(w)),
        lambda w: torch.cat([w, w]), lambda w: torch.empty_like(w).copy_(w), lambda w: w.norm(dim=0),
    ):  # fmt: skip
        assert torch.equal(read(weight), read(expected))
    assert type(weight.clone()) is type(copy.deepcopy(weight)) is type(weight + 0) is torch.Tensor
    assert weight.tolist() == expected.tolist() and (weight.numpy() == expected.numpy()).all()
    assert repr(weight) == repr(expected)
    file = io.BytesIO()
    torch.save(weight, file)
    file.seek(0)
    assert torch.equal(torch.load(file), expected)


WRITES: dict[str, Callable[[torch.Tensor], Any]] = {
    "add_": lambda w: w.add_(1),
    "data +=": lambda w: w.data.__iadd__(1),
    "index": lambda w: w.__setitem__(0, 0.0),
    "detach().copy_": lambda w: w.detach().copy_(torch.ones(w.shape)),
    "view": lambda w: w[0].fill_(1),
    "views of views": lambda w: w.unsqueeze(0).detach()[0].mul_(2),
    "one of many views": lambda w: w.chunk(2)[1].zero_(),
    "init": lambda w: nn.init.normal_(w),
    "init with fans": lambda w: nn.init.xavier_uniform_(w),
    "data =": lambda w: setattr(w, "data", torch.ones(w.shape)),
    "out=": lambda w: torch.add(torch.ones(w.shape), 1, out=w),
    "foreach": lambda w: torch._foreach_add_([w], 1),
    "requires_grad_": lambda w: w.requires_grad_(),
    "requires_grad =": lambda w: setattr(w, "requires_grad", True),
    "Parameter": nn.Parameter,
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_writes_fail_and_change_nothing(layer: Any, write: str, mode: Any) -> None:
    expected = layer.decode()
    with mode(), pytest.raises(UsageError, match="a write would be lost"):
        WRITES[write](layer.weight)
    with pytest.raises(ValueError, match="read-only"):
        layer.weight.numpy()[0] = 1
    for other in (expected, nn.Parameter(expected)):
        with pytest.raises(UsageError, match="a write would be lost"):
            layer.weight = other
    assert torch.equal(layer.decode(), expected) and layer.weight.requires_grad_(False).shape == expected.shape


def test_what_changes_nothing_is_no_write(layer: Any) -> None:
    """Loops that freeze layers, or clear gradients, go over packed ones too."""
    layer.weight.requires_grad = False
    layer.weight.grad = None
    assert not layer.weight.requires_grad_(False).requires_grad and layer.weight.grad is None


def test_other_libraries_get_its_numbers(layer: Any) -> None:
    """DLPack looks at memory, of which a weight that is decoded for whoever reads it has none."""
    shared = torch.from_dlpack(layer.weight)
    assert torch.equal(shared, layer.decode())
    shared.zero_()
    assert layer.decode().count_nonzero()


@pytest.mark.parametrize("see", [lambda w: w, torch.Tensor.detach, lambda w: w.mT, lambda w: w[0], lambda w: w.data])
def test_it_has_no_address(layer: Any, see: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """A capsule, or a comparison, of an address that is 0 would end the process, or call all weights one."""
    weight = see(layer.weight)
    with pytest.raises(RuntimeError, match="Cannot access data pointer"):
        torch.utils.dlpack.to_dlpack(weight)
    with pytest.raises(UsageError, match="has no address"):
        weight.data_ptr()
    if weight.is_contiguous():
        with pytest.raises(UsageError, match="has no address"):
            safetensors.torch.save({"weight": weight})


def test_gradients_pass_through_products_with_it() -> None:
    layer = spicerack.quantize(nn.Linear(64, 48), "w8")
    grads = []
    for weight in (layer.weight, layer.decode()):
        x = torch.linspace(-1, 1, 3 * 64).view(3, 64).requires_grad_()
        nn.functional.linear(x, weight, layer.bias).square().sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


def encoder(activation: str) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(64, 4, 96, activation=activation, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval()


@pytest.mark.filterwarnings(
    "ignore:The PyTorch API of nested tensors", "ignore:.*of the weights in matrices stay in float"
)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("skip", [[], ["layers.0.*=skip"]])
@torch.no_grad()
def test_torchs_encoders_call_their_packed_layers(
    activation: str, skip: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    net = encoder(activation)
    small = spicerack.quantize(net, "w8", rules=skip, compute="float")
    x, hidden = torch.randn(2, 7, 64), torch.zeros(2, 7, dtype=torch.bool)
    hidden[0, 5:] = True
    for name, part in small.named_modules():
        if isinstance(part, PackedLayer):  # the same numbers, by torch's fast path
            nn.Module.get_parameter(net, f"{name}.weight").copy_(part.decode())
    expected = net(x, src_key_padding_mask=hidden), net(x), net.layers[1](x)
    monkeypatch.setattr(PackedWeight, "rows", None)  # nothing is decoded
    results = small(x, src_key_padding_mask=hidden), small(x), small.layers[1](x)
    torch.testing.assert_close(results[0][~hidden], expected[0][~hidden], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(results[1:], expected[1:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "float", "double"])
def test_its_type_follows_the_models(cast: str) -> None:
    net = nn.Sequential(nn.Embedding(48, 64), nn.LayerNorm(64), nn.Linear(64, 48))
    small = spicerack.quantize(net, "w8", rules=["0=w8"])
    before = small(torch.arange(5))
    codes = [layer.packed.qtensor() for layer in (small[0], small[2])]
    small = getattr(small, cast)()
    dtype = small[1].weight.dtype
    assert small[0].weight.dtype == small[2].weight.dtype == dtype and small[0](torch.arange(5)).dtype == dtype
    after = small(torch.arange(5))
    assert after.dtype == dtype
    torch.testing.assert_close(after.float(), before, atol=0.05, rtol=0.05)
    for layer, q in zip((small[0], small[2]), codes, strict=True):
        again = layer.packed.qtensor()
        assert (
            torch.equal(again.codes, q.codes)
            and torch.equal(again.scale, q.scale)
            and again.scale.dtype == q.scale.dtype
        )
    small.float()
    assert torch.equal(small[0].decode(), small[0].weight) and small[0].decode().dtype == torch.float32


def test_a_cast_of_everything_leaves_codes_alone() -> None:
    layer = spicerack.quantize(nn.Linear(64, 48), "w4g32")
    before = layer.decode()
    assert torch.equal(layer.type(torch.float16).decode(), before.half())
