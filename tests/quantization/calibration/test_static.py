"""Static int8 activations end to end: which scales are found, what computes with them, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families
import processes
import pytest
import torch
from calibrations import Watching
from conftest import LlamaFolder
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM
from transformers.models.bert.modeling_bert import BertIntermediate
from transformers.models.llama.modeling_llama import LlamaMLP

import spicerack
from spicerack.algorithms import method
from spicerack.cli import _output, cli
from spicerack.errors import ActivationError, OutputError, RecipeError, SchemeError, UsageError
from spicerack.machine.ranks import Ranks
from spicerack.nn.linear import QConv1D, QLinear
from spicerack.numerics.scheme import parse
from spicerack.quantization import memory
from spicerack.quantization.calibration import observer as observers
from spicerack.quantization.job import prepare
from spicerack.quantization.recipe import Recipe, decided, read, rule
from spicerack.quantization.run import execute
from spicerack.text.calibration import Calibration


def text(count: int = 12, length: int = 24, padded: bool = False) -> Calibration:
    ids = torch.randint(3, 99, (count, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(count, length, dtype=torch.bool)
    mask[1:2, 9:] = mask[4:5, 3:] = False
    return Calibration(ids, mask if padded else None, "of no text", 0.0, "made up")


def saved(family: str, folder: Path) -> Path:
    families.build(family).save_pretrained(folder)
    return folder


def rounded(source: Path, out: Path, scheme: str = "w8a8s", **more: Any) -> dict[str, torch.Tensor]:
    """Quantized by rounding to nearest -> the folder's tensors."""
    spicerack.quantize(source, scheme, output=out, **{"method": "rtn", "calibration": text(), **more})
    return load_file(out / "model.safetensors")


def scales(tensors: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name[:-12]: float(t) for name, t in tensors.items() if name.endswith(".input_scale")}


# ---- which scales ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_minmax_in_closed_form(dtype: torch.dtype, tmp_path: Path) -> None:
    """The first inputs are known: embeddings of one size, divided by it, times the norm's gains."""
    model = families.build("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.where(model.model.embed_tokens.weight < 0, -3.0, 3.0))
        model.model.layers[0].input_layernorm.weight.copy_(torch.linspace(-2.5, 2.0, 32))
    model.to(dtype).save_pretrained(tmp_path / "float")
    tensors = rounded(tmp_path / "float", tmp_path / "out", observer="minmax")
    static = scales(tensors)
    expected = float(torch.tensor(2.5 / 127).to(dtype))
    for name in ("q_proj", "k_proj", "v_proj"):
        stored = tensors[f"model.layers.0.self_attn.{name}.input_scale"]
        assert stored.dtype == torch.float32 and stored.shape == (1,)
        assert float(stored) == pytest.approx(expected, rel=1e-6)  # the norm's epsilon
    assert static["model.layers.0.mlp.gate_proj"] == static["model.layers.0.mlp.up_proj"]
    assert len(static) == 14


@pytest.mark.parametrize(("family", "padded"), [("llama", False), ("bert", True), ("gpt2", False)])
def test_scales_are_of_what_flows_behind_quantized_layers(
    family: str, padded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shipped model is the one in which each layer saw what its scale was found from; padding is no part of it."""
    monkeypatch.setattr(memory, "TOKENS", 100)  # several chunks
    given = text(padded=padded)
    static = scales(rounded(saved(family, tmp_path / "float"), tmp_path / "out", observer="minmax", calibration=given))
    small = spicerack.load(tmp_path / "out").eval()
    small.set_attn_implementation("sdpa")
    mask = torch.ones(given.ids.shape, dtype=torch.bool) if given.mask is None else given.mask
    peaks: dict[str, float] = {}
    for name, layer in small.named_modules():
        if isinstance(layer, QLinear | QConv1D) and layer.packed.scheme.activations == "static":
            layer.register_forward_pre_hook(
                lambda _, x, name=name: peaks.__setitem__(
                    name, float(x[0].reshape(-1, x[0].shape[-1])[mask.reshape(-1)].abs().max())
                )
            )
    with torch.no_grad():
        small(input_ids=given.ids, attention_mask=mask.long())
    stored = {name.removeprefix("transformer."): scale for name, scale in static.items()}
    assert len(peaks) == len(stored) == {"llama": 14, "bert": 12, "gpt2": 8}[family]
    for name, peak in peaks.items():
        assert stored[name.removeprefix("transformer.")] * 127 == pytest.approx(peak, rel=5e-3), name


def test_padding_and_chunks_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even to the observer to which the order of sequences does."""
    source, given = saved("bert", tmp_path / "float"), text(padded=True)
    assert given.mask is not None
    other = Calibration(torch.where(given.mask, given.ids, 5), given.mask, "of no text", 0.0, "made up")
    first = scales(rounded(source, tmp_path / "a", observer="moving_average", calibration=given))
    monkeypatch.setattr(memory, "TOKENS", 50)
    forward = BertIntermediate.forward
    monkeypatch.setattr(BertIntermediate, "forward", lambda m, x: forward(m, x.flatten(0, 1)).view(*x.shape[:2], -1))
    again = scales(rounded(source, tmp_path / "b", observer="moving_average", calibration=other))
    assert first.keys() == again.keys() and len(first) == 12
    assert all(first[name] == pytest.approx(again[name], rel=1e-4) for name in first)
    assert len(set(first.values())) == 8


def test_observers_differ_and_the_ledger_says_which(tmp_path: Path) -> None:
    source, chosen = saved("llama", tmp_path / "float"), {}
    for name in observers.names():
        chosen[name] = scales(rounded(source, tmp_path / name, observer=name))["model.layers.0.mlp.down_proj"]
        ledger = json.loads((tmp_path / name / "spicerack.json").read_text())
        assert ledger["identity"]["recipe"]["observer"] == name
    assert chosen["mse"] < chosen["minmax"] and chosen["moving_average"] < chosen["minmax"]
    assert len(set(chosen.values())) >= 4
    spicerack.quantize(source, "w8", output=tmp_path / "w8", calibration=text())
    assert "observer" not in json.loads((tmp_path / "w8" / "spicerack.json").read_text())["identity"]["recipe"]


def test_layers_outside_of_blocks_keep_a_scale_per_token_and_it_is_said(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "float")
    job = prepare(source, decided(Recipe(parse("w8a8s")), True).then([rule("lm_head=w8a8s")]))
    assert any(note.startswith("lm_head: an expert, or outside of the blocks") for note in job.notes)
    tensors = rounded(source, tmp_path / "out", rules=["lm_head=w8a8s"])
    assert "lm_head.input_scale" not in tensors and tensors["lm_head.weight"].dtype == torch.int8
    entries = {e["tensor"]: e for e in json.loads((tmp_path / "out" / "spicerack.json").read_text())["tensors"]}
    assert entries["lm_head.weight"]["scheme"] == "w8a8"
    assert entries["lm_head.weight"]["why"].startswith("rule lm_head=w8a8s; an expert, or outside of the blocks")
    assert entries["model.layers.0.mlp.up_proj.weight"]["scheme"] == "w8a8s"
    model = spicerack.load(tmp_path / "out")
    assert model.lm_head.packed.scheme == parse("w8a8")


# ---- what computes with them -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["w8a8s", "w4g16a8s", "w8ta8s"])
def test_a_loaded_model_computes_as_float_layers_with_rounded_inputs(scheme: str, tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "float")
    rounded(source, tmp_path / "out", scheme)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert ("quantization_config" in config) == (scheme == "w8a8s")
    small = spicerack.load(tmp_path / "out")
    small.set_attn_implementation("sdpa")
    dense = LlamaForCausalLM.from_pretrained(source)
    for name, layer in small.named_modules():
        if isinstance(layer, QLinear):
            float_layer = dense.get_submodule(name)
            float_layer.weight.data = layer.decode()
            s = float(layer.packed.qtensor().input_scale)
            float_layer.register_forward_pre_hook(lambda _, x, s=s: (x[0] / s).round().clamp(-127, 127) * s)
    ids = text().ids[:4]
    with torch.no_grad():
        a, b = small(input_ids=ids).logits, dense(input_ids=ids).logits
    assert torch.allclose(a, b, atol=2e-3 * float(b.abs().max()))


def test_saving_what_was_loaded_writes_the_same(tmp_path: Path) -> None:
    for scheme, family in (("w8a8s", "llama"), ("w4g16a8s", "llama"), ("w8a8s", "gpt2")):
        source = saved(family, tmp_path / f"{scheme}-{family}")
        before = rounded(source, tmp_path / f"out-{scheme}-{family}", scheme)
        model = spicerack.load(tmp_path / f"out-{scheme}-{family}")
        after = load_file(spicerack.save(model, tmp_path / f"again-{scheme}-{family}") / "model.safetensors")
        packed = {name for name in before if name.endswith((".input_scale", ".codes", ".weight_scale", "_packed"))}
        assert packed and all(torch.equal(before[name], after[name]) for name in packed)


def test_casting_a_model_leaves_its_scales(tmp_path: Path) -> None:
    rounded(saved("llama", tmp_path / "float"), tmp_path / "out")
    model = spicerack.load(tmp_path / "out")
    before = model.model.layers[0].mlp.up_proj.packed.qtensor().input_scale.clone()
    after = model.bfloat16().model.layers[0].mlp.up_proj.packed.qtensor().input_scale
    assert after.dtype == torch.float32 and torch.equal(before, after)


# ---- several processes -----------------------------------------------------------------------------------------------

_SHARE = """
import sys, torch
from spicerack.quantization.calibration import observer as observers
from spicerack.machine.ranks import join
ranks = join(torch.device("cpu"))
x = torch.load(sys.argv[1])
for name in observers.names():
    observer = observers.begin(name)
    for batch in x if observer.in_order else x[ranks.rank :: ranks.count]:
        observer.add(batch)
    observer.share(ranks)
    with open(f"{sys.argv[1]}.{ranks.rank}", "a") as file:
        print(name, float(observer.scale()).hex(), file=file)
"""


@pytest.mark.slow
def test_two_processes_find_what_one_does(tmp_path: Path) -> None:
    """The largest value, and so the width of bins, is only seen by one of them."""
    x = torch.randn(5, 400, 16, generator=torch.Generator().manual_seed(0)) ** 3
    x[3, 5, 2] = 700
    torch.save(x, tmp_path / "x.pt")
    both = [process.wait() for process in processes.pair(_SHARE, [tmp_path / "x.pt"], tmp_path)]
    assert [process.returncode for process in both] == [0, 0], "".join(process.stderr for process in both)
    expected = []
    for name in observers.names():
        observer = observers.begin(name)
        for batch in x:
            observer.add(batch)
        expected.append(f"{name} {observer.scale().hex()}")
    assert all((tmp_path / f"x.pt.{rank}").read_text().splitlines() == expected for rank in (0, 1))


def test_a_rank_that_saw_nothing_takes_in_what_others_saw() -> None:
    class Other(Ranks):
        def largest(self, value: torch.Tensor) -> torch.Tensor:
            return value.clamp(min=12.7)

        def total(self, value: torch.Tensor) -> torch.Tensor:
            return value + 0

    observer = observers.begin("minmax")
    observer.share(Other(0, 2))
    assert observer.scale() == pytest.approx(0.1)
    alone = observers.begin("minmax")
    alone.share(Ranks())
    with pytest.raises(ActivationError, match="no token"):
        alone.scale()


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_what_static_scales_need_is_said(tmp_path: Path) -> None:
    source, out = saved("llama", tmp_path / "float"), tmp_path / "out"
    for options in ({}, {"method": "hqq"}, {"rules": ["**.up_proj=w4g16a8s"]}):
        scheme = "w8" if "rules" in options else "w8a8s"
        with pytest.raises(SchemeError, match="need calibration text"):
            spicerack.quantize(source, scheme, output=out, **options)  # type: ignore[call-overload]
    with pytest.raises(RecipeError, match="no scheme has static activations"):
        spicerack.quantize(source, "w8a8", output=out, calibration=text(), observer="mse")
    with pytest.raises(RecipeError, match=r"unknown observer 'max'.*minmax"):
        spicerack.quantize(source, "w8a8s", output=out, calibration=text(), observer="max")
    with pytest.raises(SchemeError, match=r"the layer: static .*use w4g32a8: a scale per token"):
        spicerack.quantize(torch.nn.Linear(32, 32), "w4g32a8s")
    with pytest.raises(UsageError, match="in memory"):
        spicerack.quantize(torch.nn.Linear(32, 32), "w8", observer="mse")
    assert not list(tmp_path.glob("out*"))


def test_a_layer_that_no_token_reaches_has_no_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaMLP, "forward", lambda mlp, x: mlp.down_proj(mlp.gate_proj(x)))
    source = saved("llama", tmp_path / "float")
    with pytest.raises(ActivationError, match=r"model\.layers\.0\.mlp\.up_proj: the layer has seen no token"):
        rounded(source, tmp_path / "out")


def test_nan_names_block_layer_and_sequence(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "float")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][3] = torch.nan
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ActivationError, match=r"layers\.1\.self_attn\.q_proj, sequence 0: token \[0\], column 3"):
        rounded(source, tmp_path / "out")


def test_another_observer_does_not_continue(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "float")

    def stop(_: Any) -> None:
        raise KeyboardInterrupt

    names = ("mse", "kl")
    jobs = [
        prepare(source, decided(Recipe(parse("w8a8s"), method=method.parse("rtn"), observer=n), True)) for n in names
    ]
    with pytest.raises(KeyboardInterrupt):
        execute(jobs[0], tmp_path / "out", calibration=text(), watch=Watching(finished=stop))
    with pytest.raises(OutputError, match="another recipe"):
        execute(jobs[1], tmp_path / "out", calibration=text())


# ---- from the command line -------------------------------------------------------------------------------------------


def test_the_command_and_the_recipe_file(
    llama_folder: LlamaFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, lines, recipe = llama_folder(), tmp_path / "text.txt", tmp_path / "recipe.yaml"
    lines.write_text("".join(f"line {i} of a text, and more of it\n" for i in range(99)))
    recipe.write_text("scheme: w8a8s\nmethod: rtn\nobserver: mse\n")
    assert read(recipe).observer == "mse"
    base = ["quantize", str(source), "--no-check", "--calib", str(lines), "--length", "64", "--samples", "8"]
    assert _output.run(cli, [*base, "-o", str(tmp_path / "a"), "--recipe", str(recipe)]) == 0
    assert "observer=mse" in "".join(capsys.readouterr())
    by_hand = [*base, "-o", str(tmp_path / "b"), "--scheme", "w8a8s", "--method", "rtn", "--observer", "mse"]
    assert _output.run(cli, by_hand) == 0
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    assert _output.run(cli, ["inspect", str(tmp_path / "a")]) == 0
    assert "w8a8s" in capsys.readouterr().out
    ledger = json.loads((tmp_path / "a" / "spicerack.json").read_text())["tensors"]
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    for entry in (e for e in ledger if e["action"] == "quantize"):
        module = entry["tensor"].removesuffix(".weight")
        assert entry["bytes_after"] == sum(t.nbytes for n, t in tensors.items() if n.startswith(f"{module}."))
    recipe.write_text("scheme: w8a8s\nobserver: best\n")
    assert _output.run(cli, [*base, "-o", str(tmp_path / "c"), "--recipe", str(recipe)]) == 2
    assert "unknown observer" in "".join(capsys.readouterr())
