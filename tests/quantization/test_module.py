"""Modules in memory: what `quantize(module)` makes, against the specification; `save` and back, read by others too."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import families
import pytest
import torch
from dense import logits
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from torch.nn.utils import prune
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import spicerack
from spicerack.errors import LoadError, OutputError, RecipeError, SchemeError, ShapeError, UsageError, WeightError
from spicerack.nn.conv import QConv2d
from spicerack.nn.linear import QLinear
from spicerack.nn.weight import PackedLayer
from spicerack.numerics import codec
from spicerack.numerics.qtensor import QTensor
from spicerack.numerics.scheme import parse

pytestmark = pytest.mark.usefixtures("reference_kernel")

IDS = torch.randint(5, 90, (2, 9), generator=torch.Generator().manual_seed(0))
X = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """A tied table and head around layers of all kinds that stay or go."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 64, padding_idx=3)
        self.body = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.LayerNorm(96), nn.Linear(96, 64, bias=False))
        self.conv = Conv1D(64, 64)
        self.head = nn.Linear(64, 50, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.conv(self.body(self.table(ids))))
        return out


def packed(module: nn.Module) -> dict[str, PackedLayer]:
    modules = module.named_modules(remove_duplicate=False)
    return {name: layer for name, layer in modules if isinstance(layer, PackedLayer)}


def same(a: QTensor, b: QTensor) -> bool:
    parts = [(a.codes, b.codes), (a.scale, b.scale), (a.zero, b.zero), (a.min, b.min)]
    return a.transposed == b.transposed and all(
        same(x, y) if isinstance(x, QTensor) and isinstance(y, QTensor)
        else (x is None and y is None) or (isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor)
                                           and x.dtype == y.dtype and torch.equal(x, y))
        for x, y in parts
    )  # fmt: skip


def decoded(module: nn.Module, small: nn.Module) -> nn.Module:
    """The oracle: `module` with the weights that the specification encodes and decodes."""
    dense = copy.deepcopy(module)
    for name, layer in packed(small).items():
        old = dense.get_submodule(name)
        w = module.get_submodule(name).weight.detach()
        q = codec.encode(w.t() if isinstance(old, Conv1D) else w.flatten(1), layer.packed.scheme)
        w_hat = codec.decode(q, w.dtype)
        old.weight.data = (w_hat.t() if isinstance(old, Conv1D) else w_hat).reshape(w.shape).contiguous()
    return dense


def assert_same_layers(a: nn.Module, b: nn.Module) -> None:
    ours, theirs = packed(a), packed(b)
    assert ours.keys() == theirs.keys() and ours
    assert all(same(ours[name].packed.qtensor(), theirs[name].packed.qtensor()) for name in ours)


# ---- quantize --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["w8", "w4g32z", "w2g32h", "nf4"])
def test_a_module_equals_the_one_with_decoded_weights(scheme: str, dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Sequential(nn.Linear(128, 64, bias=False))).to(dtype)
    small = spicerack.quantize(net, scheme)
    assert packed(small).keys() == {"0", "2.0"}
    for name, layer in packed(small).items():
        expected = codec.encode(net.get_submodule(name).weight.detach(), parse(scheme))
        assert same(layer.packed.qtensor(), expected), name
    y = small(X.to(dtype))
    assert y.dtype == dtype
    assert torch.allclose(y, decoded(net, small)(X.to(dtype)), atol=1e-6 if dtype == torch.float32 else 2e-2)


def test_a_layer_on_its_own_becomes_the_quantized_layer(tmp_path: Path) -> None:
    linear = nn.Linear(64, 32)
    small = spicerack.quantize(linear, "w4g32")
    assert isinstance(small, QLinear) and type(linear) is nn.Linear
    assert torch.allclose(small(X), decoded(linear, small)(X), atol=1e-6)
    table = nn.Embedding(9, 64)
    rows = spicerack.quantize(table, "w8")
    assert torch.equal(rows(torch.arange(9)), codec.decode(codec.encode(table.weight.detach(), parse("w8"))))
    with pytest.raises(UsageError, match="no name"):
        spicerack.save(small, tmp_path / "out")


def test_the_original_is_untouched_and_shares_nothing() -> None:
    net = Net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    small = spicerack.quantize(net, "w8")
    with torch.no_grad():
        for tensor in (*small.parameters(), *small.buffers()):
            tensor.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert not packed(net) and net.head.weight is net.table.weight


def test_big_weights_are_never_copied_as_floats() -> None:
    class Heavy(nn.Parameter):
        def __deepcopy__(self, memo: object) -> nn.Parameter:
            raise AssertionError("a float weight was duplicated")

    net = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))
    net[0].weight = Heavy(net[0].weight.detach())
    assert packed(spicerack.quantize(net, "w8")).keys() == {"0"}
    with pytest.raises(AssertionError, match="duplicated"):
        copy.deepcopy(net)


def test_mode_gradients_and_hooks_are_kept() -> None:
    calls: list[str] = []
    net = nn.Sequential(nn.Linear(64, 64), nn.Dropout(), nn.LayerNorm(64), nn.Embedding(4, 64)).eval()
    net[1].train()
    net[2].bias.requires_grad_(False)
    net[0].bias.requires_grad_(False)
    net[0].register_forward_hook(lambda *_: calls.append("layer"))
    net[2].register_forward_pre_hook(lambda *_: calls.append("norm"))
    small = spicerack.quantize(net, "w8", rules=["3=w8"])
    assert [part.training for part in small] == [False, True, False, False]
    assert {name: p.requires_grad for name, p in small.named_parameters()} == {
        "0.bias": False, "2.weight": True, "2.bias": False,
    }  # fmt: skip
    small[:3](X)
    assert calls == ["layer", "norm"]
    assert all(layer.training for layer in packed(spicerack.quantize(net.train(), "w8", rules=["3=w8"])).values())


def test_rules_go_by_the_modules_paths() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
            self.part = nn.ModuleDict({"head": nn.Linear(64, 64)})

    small = spicerack.quantize(Two(), "w4g32", rules=["body.0=w8", "**.head=skip"])
    assert {name: layer.packed.scheme.name for name, layer in packed(small).items()} == {
        "body.0": "w8", "body.1": "w4g32",
    }  # fmt: skip


def test_tied_layers_share_one_packed_weight_and_embeddings_wait_for_a_rule() -> None:
    net = Net()
    assert packed(spicerack.quantize(net, "w8")).keys() == {"body.0", "body.3", "conv"}
    for rule in ("head=w8", "table=w8"):
        small = spicerack.quantize(net, "w4g32", rules=[rule])
        assert small.head.packed is small.table.packed and small.head.packed.scheme.name == "w8"
        assert small.table.padding_idx == 3
        assert torch.allclose(small(IDS[:, :4] % 50), decoded(net, small)(IDS[:, :4] % 50), atol=1e-5)
        again = copy.deepcopy(small)
        assert again.head.packed is again.table.packed and again.head.packed is not small.head.packed
        assert torch.equal(again(IDS % 50), small(IDS % 50))


def test_a_head_before_its_embedding_stays_in_float_too() -> None:
    net = nn.ModuleDict({"out": nn.Linear(64, 50, bias=False), "table": nn.Embedding(50, 64), "mid": nn.Linear(64, 64)})
    net["table"].weight = net["out"].weight
    assert packed(spicerack.quantize(net, "w8")).keys() == {"mid"}


def test_a_block_used_twice_stays_one_block() -> None:
    block = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
    small = spicerack.quantize(nn.Sequential(block, block), "w8")
    assert small[0] is small[1] and isinstance(small[0][0], QLinear)
    linear = nn.Linear(64, 64)
    small = spicerack.quantize(nn.Sequential(linear, linear), "w8")
    assert small[0] is small[1] and isinstance(small[0], QLinear)


def test_torchs_own_transformer_layer() -> None:
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()
    with pytest.warns(
        UserWarning, match=r"50% of the weights in matrices stay in float: self_attn.in_proj_weight \(a par"
    ):
        small = spicerack.quantize(layer, "w4g32")
    assert packed(small).keys() == {"linear1", "linear2"}
    for mode in (torch.no_grad(), torch.enable_grad()):
        with mode:
            assert torch.allclose(small(X[None]), decoded(layer, small)(X[None]), atol=1e-5)


def test_gradients_reach_inputs_and_what_is_trained_around() -> None:
    net = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64))
    small = spicerack.quantize(net, "w4g32z")
    dense = decoded(net, small)
    gradients = []
    for model in (small, dense):
        torch.manual_seed(1)
        down, up = nn.Linear(64, 4), nn.Linear(4, 64)
        x = X.clone().requires_grad_()
        functional.mse_loss(model(x + up(down(x))), X).backward()
        assert x.grad is not None and down.weight.grad is not None and model[0].bias.grad is not None
        gradients.append((x.grad, down.weight.grad, model[0].bias.grad))
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-7) and ours.abs().max() > 0


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert-classifier", "falcon", "opt"])
def test_defaults_are_those_of_the_command(family: str, tmp_path: Path) -> None:
    model = families.build(family)
    model.save_pretrained(tmp_path / "model")
    spicerack.quantize(tmp_path / "model", "w4g8", output=tmp_path / "out")
    loaded = spicerack.load(tmp_path / "out")
    small = spicerack.quantize(model.eval(), "w4g8")
    assert_same_layers(small, loaded)
    assert torch.equal(logits(small, IDS), logits(loaded, IDS))


# ---- convolutions ----------------------------------------------------------------------------------------------------


class Pictures(nn.Module):
    """Convolutions of several geometries, two of which share a weight, before a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 16, 3, padding="same")
        self.body = nn.Sequential(nn.ReLU(), nn.Conv2d(16, 16, (1, 3), (2, 1), (0, 1), 1, 2, bias=False), nn.GELU())
        self.mix, self.again = nn.Conv2d(16, 16, 2, dilation=2), nn.Conv2d(16, 16, 2, padding=1)
        self.again.weight = self.mix.weight
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.again(self.mix(self.body(self.first(x)))).mean((-2, -1)))
        return out


PICTURES = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("scheme", "rules"), [
    ("w4", []), ("w8", ["body.1=w2g8h"]), ("w4g4z", []), ("nf4", ["first=w8", "body.*=w8", "mix=w8", "head=w8"]),
])  # fmt: skip
def test_convolutions_compute_with_decoded_weights(
    scheme: str, rules: list[str], dtype: torch.dtype, tmp_path: Path
) -> None:
    net = Pictures().to(dtype).eval()
    small = spicerack.quantize(net, scheme, rules=rules)
    assert packed(small).keys() == {"first", "body.1", "mix", "again", "head"}
    assert small.mix.packed is small.again.packed and isinstance(small.body[1], QConv2d)
    dense = decoded(net, small)
    x = PICTURES.to(dtype)
    assert torch.equal(small.first.weight, dense.first.weight) and small.first.weight.shape == net.first.weight.shape
    assert torch.equal(small.mix(small.body(small.first(x))), dense.mix(dense.body(dense.first(x))))
    assert torch.allclose(small(x), dense(x), atol=1e-6 if dtype == torch.float32 else 2e-2)
    fresh = spicerack.load(spicerack.save(small, tmp_path / "out"), into=Pictures().to(dtype).eval())
    assert_same_layers(small, fresh)
    assert fresh.mix.packed is fresh.again.packed
    assert torch.equal(fresh(x), small(x))


def test_convolutions_are_quantized_where_they_would_be_trained() -> None:
    """By default in modules of one's own, and not in transformers models, like `prepare_qat`: the codes are equal."""
    net = Pictures()
    frozen = spicerack.freeze(spicerack.prepare_qat(copy.deepcopy(net), "w4"))
    assert_same_layers(spicerack.quantize(net, "w4"), frozen)
    assert packed(spicerack.quantize(net, "w4", rules=["**=skip", "first=w8"])).keys() == {"first"}
    alone = spicerack.quantize(nn.Conv2d(4, 2, 3), "w8")
    assert isinstance(alone, QConv2d)
    vit = families.build("vit")
    inside = nn.ModuleDict({"theirs": vit, "ours": nn.Conv2d(4, 2, 3)})
    assert any(isinstance(part, nn.Conv2d) for part in vit.modules())
    for model, convolutions in ((vit, set()), (inside, {"ours"})):
        with pytest.warns(UserWarning, match=r"projection \(convolutions of transformers models stay in float\)"):
            layers = packed(spicerack.quantize(model, "w8"))
        assert {name for name, layer in layers.items() if isinstance(layer, QConv2d)} == convolutions and layers
        with pytest.raises(
            RecipeError, match=r"rule \*\*\.projection=w8: .*projection stays in float: convolutions of"
        ):
            spicerack.quantize(model, "w8", rules=["**.projection=w8"])


@pytest.mark.parametrize(("change", "scheme", "error", "message"), [
    ({"padding_mode": "reflect"}, "w8", RecipeError, "^0: a convolution with padding_mode='reflect' has no packed"),
    ({}, "w8a8", SchemeError, r"^0: a convolution has no tokens to find scales of \(use the scheme without a8\)"),
    ({}, "w8a8s", SchemeError, r"^0: a convolution has no tokens to find scales of"),
    ({}, "w4g32", ShapeError, r"^0\.weight.*K=36 is not divisible by w4g32"),
])  # fmt: skip
def test_convolutions_that_have_no_packed_form_are_named(
    change: dict[str, str], scheme: str, error: type[Exception], message: str
) -> None:
    net = nn.Sequential(nn.Conv2d(4, 8, 3, **change), nn.Flatten(), nn.Linear(64, 8))
    with pytest.raises(error, match=message):
        spicerack.quantize(net, scheme)
    if scheme != "w8a8s":  # which no layer in memory has
        assert packed(spicerack.quantize(net, scheme, rules=["0=skip"])).keys() == {"2"}


def test_a_convolution_that_pads_otherwise_is_not_filled(tmp_path: Path) -> None:
    folder = spicerack.save(spicerack.quantize(nn.Sequential(nn.Conv2d(4, 8, 3, padding=1)), "w8"), tmp_path / "out")
    other = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular"))
    with pytest.raises(LoadError, match=r"^0: 0: a convolution with padding_mode='circular'"):
        spicerack.load(folder, into=other)


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_experts_in_one_parameter_stay_in_float_and_are_named() -> None:
    model = families.build("mixtral")
    with pytest.warns(UserWarning, match=r"MixtralForCausalLM: \d+% of the weights.*experts in one parameter"):
        small = spicerack.quantize(model, "w4g8")
    experts = {name: p for name, p in model.named_parameters() if p.dim() == 3}
    assert experts and all(torch.equal(small.get_parameter(name), p) for name, p in experts.items())
    with pytest.raises(
        RecipeError,
        match=r"rule \*\*\.experts\.\*=w8: .*experts.* stays in float: experts in one parameter of MixtralExp",
    ):
        spicerack.quantize(model, "w4g8", rules=["**.experts.*=w8"])


def test_experts_that_are_layers_are_quantized_like_others(tmp_path: Path) -> None:
    """A stack of float experts, as `load` leaves it beside packed ones: each of its matrices is a linear layer."""
    families.build("mixtral").save_pretrained(tmp_path / "model")
    spicerack.quantize(tmp_path / "model", "w8", output=tmp_path / "out", rules=["**.experts.2.*=skip"])
    model = spicerack.load(tmp_path / "out")
    floats = {name for name, layer in model.named_modules() if type(layer) is nn.Linear and ".experts." in name}
    small = spicerack.quantize(model, "w4g8")
    assert floats and all(small.get_submodule(name).packed.scheme.name == "w4g8" for name in floats)
    assert small.get_submodule(min(floats)) is not model.get_submodule(min(floats))


def test_what_is_refused_is_named() -> None:
    net = Net()
    with pytest.raises(RecipeError, match="LayerNorm has no layer"):
        spicerack.quantize(nn.LayerNorm(4), "w8")
    with pytest.raises(RecipeError, match=r"no layer that the recipe.*'0=w8'"):
        spicerack.quantize(nn.Sequential(nn.Embedding(4, 4)), "w8")
    with pytest.raises(RecipeError, match=r"rule bdy\.0=w8 matches nothing.*body\.0"):
        spicerack.quantize(net, "w8", rules=["bdy.0=w8"])
    with pytest.raises(ShapeError, match=r"body.3.weight(.|\n)*conv.weight|conv.weight(.|\n)*body.3.weight") as caught:
        spicerack.quantize(net, "w4g48", rules=["body.3=w4g36"])
    assert "body.0.weight" in caught.value.message and "rules=" in caught.value.hint
    with pytest.raises(SchemeError, match="table: an embedding has no activations"):
        spicerack.quantize(net, "w8", rules=["table=w8a8"])
    with pytest.raises(UsageError, match="save"):
        spicerack.quantize(net, "w8", output="out")
    with pytest.raises(WeightError, match="meta"), torch.device("meta"):
        spicerack.quantize(nn.Sequential(nn.Linear(8, 8)), "w8")
    with torch.no_grad():
        net.body[3].weight[2, 5] = torch.nan
    with pytest.raises(WeightError, match=r"body\.3\.weight: 1 weights .* nan at \[2, 5\]"):
        spicerack.quantize(net, "w8")
    spicerack.quantize(net, "w8", rules=["body.3=skip"])


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}])
def test_embeddings_that_do_more_than_look_up_are_refused(option: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match="0: an embedding with max_norm"):
        spicerack.quantize(nn.Sequential(nn.Embedding(4, 4, **option)), "w8", rules=["0=w8"])


def test_a_weight_held_elsewhere_or_made_from_others_is_refused() -> None:
    net = nn.Sequential(nn.Linear(8, 8))
    net.mine = net[0].weight
    with pytest.raises(RecipeError, match=r"0\.weight is tied to mine of a Sequential"):
        spicerack.quantize(net, "w8")
    pruned = nn.Sequential(prune.identity(nn.Linear(8, 8), "weight"))
    with pytest.raises(RecipeError, match=r"0\.weight is computed from other"):
        spicerack.quantize(pruned, "w8")


# ---- save ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rules", [[], ["table=w8"], ["conv=skip", "body.0=w4g32z"]])
def test_a_module_comes_back_into_a_fresh_one(tmp_path: Path, rules: list[str]) -> None:
    small = spicerack.quantize(Net(), "w4g32", rules=rules)
    assert spicerack.save(small, tmp_path / "out") == tmp_path / "out"
    fresh = Net()
    assert spicerack.load(tmp_path / "out", into=fresh) is fresh
    assert_same_layers(small, fresh)
    assert torch.equal(fresh(IDS % 50), small(IDS % 50))
    assert (
        (fresh.head.packed is fresh.table.packed)
        if rules == ["table=w8"]
        else (fresh.head.weight is fresh.table.weight)
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rules", [[], ["model.embed_tokens=w4g32z"], ["lm_head=w8"]])
def test_a_transformers_model_comes_back(tmp_path: Path, tied: bool, rules: list[str]) -> None:
    config = LlamaConfig(**families.LLAMA, tie_word_embeddings=tied)
    small = spicerack.quantize(LlamaForCausalLM(config).eval(), "w4g8", rules=[r.replace("g32z", "g8z") for r in rules])
    folder = spicerack.save(small, tmp_path / "out")
    loaded = spicerack.load(folder)
    assert type(loaded) is LlamaForCausalLM
    assert_same_layers(small, loaded)
    assert torch.equal(logits(loaded, IDS), logits(small, IDS))
    if json.loads((folder / "config.json").read_text())["model_type"] == "llama":
        theirs = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.allclose(logits(theirs, IDS), logits(small, IDS), atol=1e-5)
    else:
        assert rules and (tied or "embed" in rules[0])
    again = spicerack.save(loaded, tmp_path / "again")
    ours, theirs_ = load_file(folder / "model.safetensors"), load_file(again / "model.safetensors")
    assert ours.keys() == theirs_.keys() and all(torch.equal(ours[name], theirs_[name]) for name in ours)
    assert not list(folder.glob("*token*"))
    assert rules or ("lm_head.weight" in ours) != tied


@pytest.mark.parametrize("family", ["gpt2", "bert-mlm", "t5"])
def test_other_families_come_back(family: str, tmp_path: Path) -> None:
    small = spicerack.quantize(families.build(family).eval(), "w4g8")
    loaded = spicerack.load(spicerack.save(small, tmp_path / "out"))
    assert_same_layers(small, loaded)
    inputs = {"input_ids": IDS} | ({"decoder_input_ids": IDS} if family == "t5" else {})
    with torch.no_grad():
        assert torch.equal(loaded(**inputs)[0], small(**inputs)[0])


def test_saving_what_was_quantized_as_a_folder_or_cast_writes_the_same_codes(llama_folder, tmp_path: Path) -> None:
    spicerack.quantize(llama_folder(), "w4g32z", output=tmp_path / "out")
    for name, dtype in (("same", None), ("cast", torch.bfloat16)):
        saved = spicerack.save(spicerack.load(tmp_path / "out", dtype=dtype), tmp_path / name)
        ours, theirs = (load_file(folder / "model.safetensors") for folder in (saved, tmp_path / "out"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours if dtype is None or "_proj" in key)


def test_save_refuses(tmp_path: Path) -> None:
    small = spicerack.quantize(nn.Sequential(nn.Linear(64, 64)), "w8")
    (tmp_path / "taken").mkdir()
    with pytest.raises(OutputError, match="taken exists"):
        spicerack.save(small, tmp_path / "taken")
    with pytest.raises(UsageError, match="no quantized layers"):
        spicerack.save(nn.Linear(4, 4), tmp_path / "out")
    small.register_parameter("phase", nn.Parameter(torch.zeros(2, dtype=torch.complex64)))
    with pytest.raises(UsageError, match=r"phase is torch\.complex64"):
        spicerack.save(small, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_packed_experts_are_not_saved_as_something_else(tmp_path: Path) -> None:
    families.build("mixtral").save_pretrained(tmp_path / "model")
    spicerack.quantize(tmp_path / "model", "w8", output=tmp_path / "out")
    with pytest.raises(UsageError, match="packed experts"):
        spicerack.save(spicerack.load(tmp_path / "out"), tmp_path / "again")


def test_save_pretrained_refuses_rather_than_write_what_nobody_reads(tmp_path: Path) -> None:
    small = spicerack.quantize(families.build("llama"), "w8")
    with pytest.raises(ValueError, match="not serializable"):
        small.save_pretrained(tmp_path / "out")


def test_a_killed_save_leaves_no_folder_and_mixes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = spicerack.quantize(Net(), "w8")
    other = copy.deepcopy(small)
    with torch.no_grad():
        other.body[0].bias[0] += 1

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("spicerack.storage.writer.Writer.finish", die)
        with pytest.raises(KeyboardInterrupt):
            spicerack.save(small, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(OutputError, match="another source"):
        spicerack.save(other, tmp_path / "out")
    fresh = spicerack.load(spicerack.save(small, tmp_path / "out"), into=Net())
    assert torch.equal(fresh(IDS % 50), small(IDS % 50))


def test_how_a_folder_computes_is_said_when_it_is_loaded(tmp_path) -> None:
    with pytest.raises(UsageError, match="compute is no property of a folder"):
        spicerack.quantize(tmp_path, "w8", output=tmp_path / "out", compute="float")  # type: ignore[call-overload]


# ---- what stays in float ---------------------------------------------------------------------------------------------


class Cast(nn.Linear):
    """As openai/whisper's: a forward of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight.to(x.dtype), self.bias)


class Mine(nn.Embedding):
    """Rows times a number."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return 8 * super().forward(ids)


@pytest.mark.parametrize("call", [spicerack.quantize, spicerack.prepare_qat])
@pytest.mark.parametrize(("layer", "reason"), [
    (lambda: Cast(64, 64), "Cast is a subclass of Linear, which may compute something else"),
    (lambda: nn.Linear(64, 64).double(), "float64 weights are not quantized"),
    (lambda: nn.Bilinear(8, 8, 64), "Bilinear has no packed form"),
])  # fmt: skip
def test_what_stays_in_float_is_told_with_its_reason(call, layer, reason: str) -> None:
    with pytest.raises(RecipeError, match=f"Sequential has no layer .*{reason}"):
        call(nn.Sequential(layer()), "w8")
    with pytest.warns(
        UserWarning, match=rf"Sequential: \d\d% of the weights in matrices stay in float: 1 \(.*{reason}"
    ):
        call(nn.Sequential(nn.Linear(64, 16), layer()), "w8")
    call(nn.Sequential(nn.Linear(640, 640), nn.Linear(16, 16).double()), "w8")  # too little to tell
    with pytest.raises(RecipeError, match=rf"rule 1=w4: 1 stays in float: .*{reason}"):
        call(nn.Sequential(nn.Linear(64, 16), layer()), "w8", rules=["1=w4"])


def test_a_rule_for_a_table_of_another_class_is_refused_by_name() -> None:
    net = nn.ModuleDict({"table": Mine(9, 64), "layer": nn.Linear(64, 64)})
    with pytest.raises(RecipeError, match=r"^rule table=w8: table stays in float: .*Mine is a subclass of Embedding"):
        spicerack.quantize(net, "w8", rules=["table=w8"])


class Keeps(nn.Module):
    """Remembers what it computed: in an attribute, in a list, and in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)
        self.register_buffer("state", torch.zeros(3, 64))
        self.past: list[dict[str, torch.Tensor]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last = self.layer(x)
        self.past.append({"loss": self.last.sum()})
        self.state = self.last + 1
        return self.last


def test_tensors_with_a_history_are_copied_without_it() -> None:
    net = Keeps()
    net(torch.randn(3, 64))
    for small in (spicerack.quantize(net, "w8"), spicerack.freeze(spicerack.prepare_qat(net, "w8"))):
        copies = (small.last, small.past[0]["loss"], small.state)
        for copied, original in zip(copies, (net.last, net.past[0]["loss"], net.state), strict=True):
            assert torch.equal(copied, original) and copied is not original
            assert not copied.requires_grad and original.requires_grad


def test_what_cannot_be_copied_is_named() -> None:
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
    net[1].batches = (x for x in ())
    with pytest.raises(UsageError, match=r"^1\.batches of ReLU is a generator, which cannot be copied"):
        spicerack.quantize(net, "w8")


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(
    "change", [lambda net: spicerack.quantize(net, "w8"), lambda net: spicerack.prepare_qat(net, "w8")]
)
def test_what_has_no_shape_is_refused_and_what_has_no_numbers_stays(
    change: Callable[[nn.Module], nn.Module],
) -> None:
    with pytest.raises(RecipeError, match=r"^1\.weight has no shape yet"):
        change(nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(8)))
    for empty in (nn.Linear(8, 0), nn.Linear(0, 8)):
        changed = change(nn.Sequential(nn.Linear(8, 8), empty))
        assert type(changed[0]) is not nn.Linear and type(changed[1]) is nn.Linear
