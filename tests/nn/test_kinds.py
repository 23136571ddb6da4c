"""The table of kinds: it holds together, and a kind that is not in it is a row and a file."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import spicerack
from spicerack.errors import CheckpointError, LoadError, RecipeError, ShapeError, UsageError
from spicerack.nn import kinds
from spicerack.nn.kinds import KINDS, LayerKind
from spicerack.nn.linear import QLinear
from spicerack.nn.weight import PackedLayer, PackedWeight
from spicerack.numerics import codec
from spicerack.numerics.scheme import parse

pytestmark = pytest.mark.usefixtures("reference_kernel")

FLOATS = {
    "linear": nn.Linear(24, 6), "conv1d": Conv1D(6, 24), "embedding": nn.Embedding(6, 24, padding_idx=2),
    "conv2d": nn.Conv2d(12, 6, (2, 1), stride=2, padding=1, dilation=2, groups=2),
}  # fmt: skip


@pytest.mark.parametrize("name", FLOATS)
def test_a_row_leads_there_and_back(name: str) -> None:
    """The float layer that is opened from a packed one computes what that decodes, and is the same but for rounding."""
    layer = FLOATS[name]
    kind = kinds.of(layer)
    assert kind.name == name and kind is kinds.named(name)
    q = codec.encode(kind.matrix(layer.weight.detach()).contiguous(), parse("w8"))
    weight = PackedWeight(dataclasses.replace(q, transposed=kind.transposed))
    packed = kind.pack(weight, kind.options(layer), kinds.bias_of(layer))
    assert type(packed) is kind.packed_class and kinds.of_packed(packed) is kind
    assert kind.options(packed) == kind.options(layer) and packed.bias is kinds.bias_of(layer)
    assert packed.weight.shape == layer.weight.shape
    again = kind.unpack(nn.Parameter(packed.decode().contiguous()), kind.options(packed), packed.bias)
    assert type(again) is type(layer) and repr(again) == repr(layer)
    assert torch.allclose(again.weight, layer.weight, atol=0.02)
    x = torch.tensor([[1, 2], [5, 0]]) if name == "embedding" else torch.randn(3, 12, 8, 8)
    x = torch.randn(3, 24) if kind.inputs == "tokens" else x
    assert torch.allclose(packed(x), again(x), atol=1e-5)


def test_rows_differ_and_copies_hold_the_row() -> None:
    assert len({kind.name for kind in KINDS}) == len({kind.float_class for kind in KINDS}) == len(KINDS)
    for kind in KINDS:
        assert pickle.loads(pickle.dumps(kind)) is kind and copy.deepcopy([kind])[0] is kind


def test_subclasses_have_no_kind_unless_they_compute_the_same() -> None:
    class Other(nn.Linear):
        pass

    class FalconLinear(nn.Linear):
        pass

    class QOther(QLinear):
        pass

    assert kinds.find(Other(4, 4)) is None and kinds.may_be_tied(Other(4, 4)) and not kinds.may_be_tied(nn.ReLU())
    assert kinds.of(FalconLinear(4, 4)).name == "linear"
    with pytest.raises(KeyError, match="Other"):
        kinds.of(Other(4, 4))
    packed = QOther(PackedWeight(codec.encode(torch.randn(4, 8), parse("w8"))))
    assert kinds.of_packed(packed).name == "linear"


def test_a_layer_with_a_forward_of_its_own_is_refused_by_name() -> None:
    net = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    net[1].forward = lambda x: x * 2
    with pytest.raises(RecipeError, match="1: its forward was replaced in this instance"):
        spicerack.quantize(net, "w8")
    assert torch.equal(spicerack.quantize(net, "w8", rules=["1=skip"])[1](torch.ones(32)), 2 * torch.ones(32))


# ---- a kind that is made up here -------------------------------------------------------------------------------------


class ScaledLinear(nn.Linear):
    """y = factor * (x W^T + b)."""

    def __init__(self, inputs: int, outputs: int, factor: float) -> None:
        super().__init__(inputs, outputs)
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.factor


class QScaledLinear(PackedLayer):
    def __init__(self, packed: PackedWeight, factor: float, bias: nn.Parameter | None) -> None:
        super().__init__(packed, bias)
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.packed(x, self.bias) * self.factor


class QConv3d(PackedLayer):
    def __init__(self, packed: PackedWeight, options: tuple[tuple[int, ...], int], bias: nn.Parameter | None) -> None:
        super().__init__(packed, bias)
        self.kernel_size, self.groups = options

    @property
    def weight(self) -> torch.Tensor:
        matrix = self.packed.decode()
        return matrix.view(len(matrix), -1, *self.kernel_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv3d(x, self.weight, self.bias, groups=self.groups)


SCALED = LayerKind(
    name="scaled", role="linear", float_class=ScaledLinear, packed_class=QScaledLinear,
    options=lambda layer: layer.factor, pack=QScaledLinear,
    blank=lambda weight, factor: ScaledLinear(weight.shape[1], weight.shape[0], factor),
    obstacle=lambda layer: "a factor that learns stays in float" if isinstance(layer.factor, nn.Parameter) else None,
    inputs="tokens",
)  # fmt: skip
CONV3D = LayerKind(
    name="conv3d", role="linear", float_class=nn.Conv3d, packed_class=QConv3d,
    options=lambda layer: (layer.kernel_size, layer.groups), pack=QConv3d,
    blank=lambda weight, options: nn.Conv3d(weight.shape[1] * options[1], weight.shape[0], *options),
    obstacle=lambda layer: None, inputs="maps",
)  # fmt: skip


def net() -> nn.Sequential:
    torch.manual_seed(0)
    video = nn.Sequential(nn.Conv3d(4, 6, (2, 2, 2), groups=2), nn.ReLU(), nn.Flatten())
    scaled = ScaledLinear(6 * 8, 24, 0.5)
    return nn.Sequential(video, scaled, nn.Tanh(), ScaledLinear(24, 24, 3.0), nn.Linear(24, 5))


def test_a_new_kind_is_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 4, 3, 3, 3)
    with pytest.warns(UserWarning, match=r"Conv3d has no packed form"):
        plain = spicerack.quantize(net(), "w4g8")
    assert {type(part) for part in plain.modules() if isinstance(part, PackedLayer)} == {QLinear}
    monkeypatch.setattr(kinds, "KINDS", (*KINDS, SCALED, CONV3D))
    small = spicerack.quantize(net(), "w4g8", rules=["3=w8"])
    packed = {name: part for name, part in small.named_modules() if isinstance(part, PackedLayer)}
    assert {name: type(part).__name__ for name, part in packed.items()} == {
        "0.0": "QConv3d", "1": "QScaledLinear", "3": "QScaledLinear", "4": "QLinear",
    }  # fmt: skip
    dense = net()
    for name, layer in packed.items():
        original = dense.get_submodule(name).weight
        original.data = codec.decode(codec.encode(original.detach().flatten(1), layer.packed.scheme)).view_as(original)
    assert torch.allclose(small(x), dense(x), atol=1e-5) and not torch.allclose(small(x), net()(x), atol=1e-5)
    loaded = spicerack.load(spicerack.save(small, tmp_path / "out"), into=net())
    assert torch.equal(loaded(x), small(x))
    for name, layer in packed.items():
        q, stored = layer.packed.qtensor(), loaded.get_submodule(name).packed.qtensor()
        assert torch.equal(q.codes, stored.codes) and torch.equal(q.scale, stored.scale)
    assert '"role": "conv3d"' in (tmp_path / "out" / "config.json").read_text()


def test_what_a_new_row_refuses_is_refused_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "KINDS", (*KINDS, SCALED, CONV3D))
    small = spicerack.quantize(net(), "w4g8")
    folder = spicerack.save(small, tmp_path / "out")
    learns = net()
    learns[1].factor = nn.Parameter(torch.ones(()))
    with pytest.raises(RecipeError, match=r"^1: a factor that learns stays in float"):
        spicerack.quantize(learns, "w4g8")
    with pytest.raises(LoadError, match=r"1: 1: a factor that learns stays in float"):
        spicerack.load(folder, into=learns)
    with pytest.raises(ShapeError, match=r"0\.0\.weight"):
        spicerack.quantize(net(), "w4g24")
    with pytest.raises(RecipeError, match=r"^0\.0: a Conv3d is not trained in few bits"):
        spicerack.prepare_qat(net(), "w4g8")
    with pytest.raises(RecipeError, match=r"is not trained in few bits"):
        spicerack.prepare_qat(small)
    monkeypatch.setattr(kinds, "KINDS", KINDS)
    with pytest.raises(CheckpointError, match=r"0\.0 is packed as 'conv3d'"):
        spicerack.load(folder, into=net())
    for use in (lambda: spicerack.save(small, tmp_path / "again"), lambda: spicerack.prepare_qat(small)):
        with pytest.raises(UsageError, match=r"a Q(Conv3d|ScaledLinear) is of no kind that is saved or trained"):
            use()
