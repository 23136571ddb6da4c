"""Packed models whose scales train: gradients by autograd of what is stored, and codes that stay what they are."""

from __future__ import annotations

import copy
from pathlib import Path

import families
import pytest
import torch
from nets import IDS, SCHEMES, small_net, tiny, train
from torch import nn

import spicerack
from spicerack import QATConfig
from spicerack.errors import SchemeError, UsageError, WeightError
from spicerack.nn.embedding import QEmbedding
from spicerack.nn.linear import QLinear
from spicerack.numerics import codec
from spicerack.numerics.levels import IntLevels
from spicerack.training.qat import prepare
from spicerack.training.qat.tuned_layers import TunedEmbedding, TunedLayer, TunedLinear

TABLES = ["nf4", "fp8"]


def tuned(model: nn.Module) -> dict[str, TunedLayer]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, TunedLayer)}


@pytest.mark.parametrize(
    ("kind", "scheme"),
    [(kind, scheme) for kind in ("linear", "embedding", "conv") for scheme in SCHEMES + TABLES * (kind != "conv")],
)
def test_values_and_gradients_are_those_of_codes_times_scales(kind: str, scheme: str) -> None:
    """Bit for bit what the codec decodes; the gradient of s is autograd's, times LSQ's factor."""
    if kind == "conv":
        x = torch.randn(3, 16, 4, 4)
        packed = spicerack.freeze(spicerack.prepare_qat(nn.Conv2d(16, 6, 2, groups=2), scheme))
    elif kind == "embedding":
        x = torch.tensor([[3, 1, 4], [1, 5, 9]])
        packed = spicerack.quantize(nn.Embedding(12, 64, padding_idx=4), scheme)
    else:
        x = torch.randn(2, 5, 64)
        packed = spicerack.quantize(nn.Linear(64, 12), scheme)
    q = packed.packed.qtensor()
    layer = spicerack.prepare_qat(packed)
    assert isinstance(layer, TunedLayer)
    decoded = codec.decode(q)
    assert torch.equal(layer.matrix(), decoded) and torch.equal(layer.weight, decoded)
    scale = q.scale.float().requires_grad_()
    group = q.scheme.group_shape(*q.shape)
    unit = (decoded.detach() / scale.detach().repeat_interleave(group[0], 0).repeat_interleave(group[1], 1)).detach()
    weight = unit * scale.repeat_interleave(group[0], 0).repeat_interleave(group[1], 1)
    if kind == "conv":
        out = nn.functional.conv2d(x, weight.view(6, -1, 2, 2), packed.bias, groups=packed.geometry.groups)
    elif kind == "embedding":
        out = nn.functional.embedding(x, weight, 4)
    else:
        out = nn.functional.linear(x, weight, packed.bias)
    outer = torch.randn(out.shape)
    (out * outer).sum().backward()
    mine = layer(x)
    assert torch.allclose(mine, out, atol=1e-5)
    (mine * outer).sum().backward()
    levels = q.scheme.levels
    if isinstance(levels, IntLevels):
        largest = levels.hi - levels.lo if q.scheme.zero else levels.hi + 0.5 * levels.half
    else:
        largest = max(levels.values)
    factor = (group[0] * group[1] * largest) ** -0.5
    assert layer.weight_scale.grad is not None and scale.grad is not None
    assert torch.allclose(layer.weight_scale.grad, factor * scale.grad, rtol=1e-4, atol=1e-5)
    if kind == "embedding" and group[0] == 1:
        assert not layer.weight_scale.grad[4].any() and layer.weight_scale.grad[5].any()


@pytest.mark.parametrize("scheme", ["w4g32", "w2g32z", "ternary", "w8a8"])
def test_inputs_get_the_gradients_of_the_packed_layer(scheme: str) -> None:
    layer = spicerack.quantize(nn.Linear(64, 12), scheme, compute="float")
    other = spicerack.prepare_qat(copy.deepcopy(layer))
    x = torch.randn(7, 64)
    outs = []
    for one in (layer, other):
        given = x.clone().requires_grad_()
        out = one(given)
        out.square().sum().backward()
        outs.append((out.detach(), given.grad))
    assert torch.allclose(outs[0][0], outs[1][0], atol=1e-5) and torch.allclose(outs[0][1], outs[1][1], atol=1e-4)


@pytest.mark.parametrize("scheme", ["w4g32", "w2g32z", "nf4", "ternarya8"])
def test_a_folder_goes_round_and_its_codes_stay(scheme: str, tmp_path: Path) -> None:
    teacher = tiny(hidden_size=64, intermediate_size=128)
    with torch.no_grad():
        wanted = teacher(input_ids=IDS).logits
    spicerack.save(spicerack.quantize(teacher, scheme), tmp_path / "first")
    before = spicerack.load(tmp_path / "first", compute="float")
    model = spicerack.prepare_qat(spicerack.load(tmp_path / "first"))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{name}.weight_scale" for name in tuned(model)} and len(trainable) == 14
    assert {id(p) for p in prepare.scales(model)} == {id(layer.weight_scale) for layer in tuned(model).values()}
    train(model, IDS, wanted)
    small = spicerack.freeze(model.eval(), compute="float")
    assert not tuned(small)
    spicerack.save(small, tmp_path / "second")
    loaded = spicerack.load(tmp_path / "second", compute="float")
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
        # Activations that lie between two integers may be rounded the other way.
        assert torch.allclose(loaded(input_ids=IDS).logits, logits, atol=5e-2 if scheme.endswith("a8") else 2e-6)
    for name, layer in tuned(model).items():
        old, new = (m.get_submodule(name).packed.qtensor() for m in (before, loaded))
        assert torch.equal(old.codes, new.codes) and (old.zero is None or torch.equal(old.zero, new.zero))
        assert not torch.equal(old.scale, new.scale) and old.scale.dtype == new.scale.dtype
        assert torch.equal(new.scale.float(), layer.scale())


def test_untrained_it_is_what_it_was() -> None:
    small = spicerack.quantize(families.build("bert").eval(), "w4g16")
    again = spicerack.freeze(spicerack.prepare_qat(copy.deepcopy(small)))
    for name, part in small.named_modules():
        if isinstance(part, QLinear):
            a, b = part.packed.qtensor(), again.get_submodule(name).packed.qtensor()
            assert torch.equal(a.codes, b.codes) and torch.equal(a.scale, b.scale)
    ids = torch.randint(3, 90, (2, 9))
    with torch.no_grad():
        small(input_ids=ids)
        assert torch.equal(small(input_ids=ids)[0], again(input_ids=ids)[0])


def test_it_learns_what_rounding_loses() -> None:
    teacher = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 8))
    x = torch.randn(512, 64)
    wanted = teacher(x).detach()
    small = spicerack.quantize(teacher, "w2g32", compute="float")
    model = spicerack.prepare_qat(copy.deepcopy(small))
    train(model, x, wanted, steps=100)
    after = spicerack.freeze(model, compute="float")
    with torch.no_grad():
        lost = [float((one(x) - wanted).square().mean()) for one in (small, after)]
    assert lost[1] < 0.8 * lost[0]


def test_tied_weights_stay_tied() -> None:
    small = spicerack.quantize(tiny(tie_word_embeddings=True), "w4g32", rules=["lm_head=w8"])
    model = spicerack.prepare_qat(small)
    head, table = model.lm_head, model.model.embed_tokens
    assert isinstance(head, TunedLinear) and isinstance(table, TunedEmbedding)
    assert head.weight_scale is table.weight_scale and head.codes is table.codes
    train(model, IDS, torch.zeros(()))
    frozen = spicerack.freeze(model.eval())
    assert isinstance(frozen.model.embed_tokens, QEmbedding)
    assert frozen.lm_head.packed is frozen.model.embed_tokens.packed


def test_codes_stay_packed_and_no_float_weight_is_kept() -> None:
    small = spicerack.quantize(nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256)), "w4g64")
    model = spicerack.prepare_qat(small)
    assert all(layer.codes.nbytes == 256 * 256 // 2 for layer in tuned(model).values())
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.randn(3, 256)).sum().backward()
    assert kept and max(kept) < 256 * 256 // 4


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_checkpointed_and_cast_it_computes_the_same() -> None:
    from torch.utils.checkpoint import checkpoint

    model = spicerack.prepare_qat(spicerack.quantize(small_net(), "w4g32"))
    x = torch.randn(5, 64)
    model(x).square().sum().backward()
    first = [p.grad.clone() for p in prepare.scales(model)]
    model.zero_grad()
    checkpoint(model, x, use_reentrant=False).square().sum().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(first, prepare.scales(model), strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        assert model[0](x).dtype == torch.bfloat16
    again = spicerack.prepare_qat(spicerack.quantize(small_net(), "w4g32"))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))


def test_bias_trains_if_you_say_so() -> None:
    model = spicerack.prepare_qat(spicerack.quantize(small_net(), "w4g32"))
    assert not model[0].bias.requires_grad and not model[2].weight.requires_grad
    model[0].bias.requires_grad_(True)
    before = model[0].bias.detach().clone()
    train(model, torch.randn(8, 64), torch.zeros(()))
    assert not torch.equal(before, model[0].bias)
    assert torch.equal(spicerack.freeze(model)[0].bias, model[0].bias)


@pytest.mark.parametrize("scheme", ["q4_k", "nvfp4", "mxfp4"])
def test_scales_that_are_no_floats_are_named(scheme: str) -> None:
    small = spicerack.quantize(nn.Sequential(nn.Linear(256, 8)), scheme)
    with pytest.raises(SchemeError, match=f"^0: {scheme} is not trained: its scales are no plain floats"):
        spicerack.prepare_qat(small)
    assert isinstance(small[0], QLinear)


def test_refusals() -> None:
    small = spicerack.quantize(small_net(), "w4g32")
    with pytest.raises(UsageError, match="is packed: only its scales train"):
        spicerack.prepare_qat(small, "w4g32")
    with pytest.raises(UsageError, match="is packed: only its scales train"):
        spicerack.prepare_qat(small, config=QATConfig("lsq"))
    with pytest.raises(UsageError, match="is not packed, and no scheme was given"):
        spicerack.prepare_qat(small_net())
    model = spicerack.prepare_qat(small)
    with pytest.raises(UsageError, match="is prepared already"):
        spicerack.prepare_qat(model)
    with torch.no_grad():
        tuned(model)["3"].weight_scale[1, 0] = 1e6
    with pytest.raises(WeightError, match=r"^3.weight: a scale was learned that is not finite"):
        spicerack.freeze(model)
