"""Mixtures of experts in the calibrated loop: what each gets, by brute force, and what becomes of starved ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from calibrations import Watching, saved, text
from safetensors.torch import load_file, save_file

import spicerack
from spicerack.algorithms.method import parse as parse_method
from spicerack.algorithms.solvers import blockap, signround
from spicerack.nn.experts import ExpertStack
from spicerack.numerics import rounding
from spicerack.numerics.scheme import parse
from spicerack.quantization import memory
from spicerack.quantization.calibration import inputs
from spicerack.quantization.job import prepare
from spicerack.quantization.recipe import Recipe, decided
from spicerack.quantization.run import execute
from spicerack.quantization.watch import Finished
from spicerack.runtime.load import load_apart
from spicerack.storage.reader import Checkpoint

pytestmark = pytest.mark.slow

EXPERT = 2
"""The one that is starved."""


def starved(family: str, folder: Path) -> Path:
    """No token likes the expert: its row of each router is far from all of them."""
    source = saved(family, folder)
    tensors = load_file(source / "model.safetensors")
    for name, w in tensors.items():
        if name.endswith(("gate.weight", "router.weight", "router.layer.weight")):
            w[EXPERT] = 0
            w *= 0.01
        if name.endswith("router.bias"):
            w[EXPERT] = -1e4
    if not any(name.endswith("router.bias") for name in tensors):  # norms keep tokens' first value positive
        for name, w in tensors.items():
            if name.endswith("embed_tokens.weight"):
                w[:, 0] = 9
            if name.endswith(("gate.weight", "router.layer.weight")):
                w[EXPERT, 0] = -9
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    return source


def run(source: Path, output: Path, scheme: str = "w4g8", chain: str = "gptq", **options: Any) -> list[Finished]:
    finished: list[Finished] = []
    job = prepare(source, decided(Recipe(parse(scheme), method=parse_method(chain)), True))
    execute(job, output, calibration=text(**options), watch=Watching(finished=finished.append))
    return finished


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_statistics_of_experts_are_those_of_their_tokens(
    family: str,
    tmp_path: Path,
    grams: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "TOKENS", 100)  # several chunks
    monkeypatch.setattr(inputs, "STATISTICS", 20_000)  # several rounds
    source = saved(family, tmp_path / "float")
    run(source, tmp_path / "out", count=40)
    small = spicerack.load(tmp_path / "out", compute="float").eval()
    small.set_attn_implementation("eager" if family == "gpt_oss" else "sdpa")
    tokens: dict[str, torch.Tensor] = {}
    for path, stack in list(small.named_modules()):
        if isinstance(stack, ExpertStack):
            for e in range(len(stack)):
                stack.parts(e)[0].register_forward_pre_hook(
                    lambda _, x, name=f"{path}.{e}": tokens.__setitem__(name, x[0].double())
                )
    with torch.no_grad():
        small(input_ids=text(count=40).ids)
    assert len(tokens) == 16  # two stacks of four in each of two blocks
    for name, x in tokens.items():
        if len(x) < inputs.FEW * x.shape[1]:
            continue
        want = x.t() @ x / len(x)
        assert any(g.shape == want.shape and torch.allclose(g, want, rtol=1e-4, atol=1e-6) for g, _, _ in grams), name
    experts = [pull for _, pull, _ in grams if pull is None]
    assert len(experts) >= 16


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen3_moe"])
def test_an_expert_without_tokens_is_shown_others(family: str, tmp_path: Path, grams: list[Any]) -> None:
    """All of its first layer's inputs are the first tokens of the stack's own input."""
    source = starved(family, tmp_path / "float")
    finished = run(source, tmp_path / "out", count=40)
    events = [e for f in finished for e in f.events if f".{EXPERT}." in e]
    assert events and all("0 tokens of its own: solved with" in event for event in events)
    assert not [e for f in finished for e in f.events if "rounded to nearest" in e]
    hidden: list[torch.Tensor] = []
    small = spicerack.load(tmp_path / "out", compute="float").eval()
    small.set_attn_implementation("eager" if family == "gpt_oss" else "sdpa")
    owner = next(m for m in small.modules() if any(isinstance(c, ExpertStack) for c in m.children()))
    owner.register_forward_pre_hook(lambda _, x: hidden.append(x[0].double()))
    with torch.no_grad():
        small(input_ids=text(count=40).ids)
    x = hidden[0][:32]
    want = x.t() @ x / 32
    assert any(g.shape == want.shape and torch.allclose(g, want, rtol=1e-4, atol=1e-6) for g, _, _ in grams)
    ledger = json.loads((tmp_path / "out" / "spicerack.json").read_text())["tensors"]
    assert any("0 tokens of its own" in event for entry in ledger for event in entry["events"])


def test_an_expert_whose_code_sends_tokens_itself_is_rounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """JetMoE's stacks are called with sorted tokens and counts: pooled second moments weigh the rounding."""
    given: list[torch.Tensor | None] = []
    original = rounding.to_nearest

    def keep(w: torch.Tensor, *args: Any, importance: torch.Tensor | None = None, **named: Any) -> Any:
        if w.shape == (96, 32):
            given.append(importance)
        return original(w, *args, importance=importance, **named)

    monkeypatch.setattr(rounding, "to_nearest", keep)
    finished = run(starved("jetmoe", tmp_path / "float"), tmp_path / "out", count=40)
    events = [e for f in finished for e in f.events if "input_linear" in e and f".{EXPERT}." in e]
    assert events and all("0 tokens: rounded to nearest, weighted by what all experts get" in event for event in events)
    first = given[:4]
    assert all(importance is not None for importance in first)
    assert torch.allclose(first[EXPERT], sum(first[e] for e in range(4) if e != EXPERT) / 3, rtol=0.5)  # type: ignore


@pytest.mark.parametrize("learned", ["signround", "blockap"])
def test_experts_without_tokens_stay_as_gptq_left_them(
    learned: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signround, "STEPS", 60)  # some codes move within them
    monkeypatch.setattr(blockap, "STEPS", 60)
    source = starved("gpt_oss", tmp_path / "float")
    for chain in ("gptq", learned):
        run(source, tmp_path / chain, "w2g8", chain, count=24)
    a, b = (load_file(tmp_path / chain / "model.safetensors") for chain in ("gptq", learned))
    codes = "model.layers.0.mlp.experts.gate_up_proj.codes"
    same = [torch.equal(a[codes][e], b[codes][e]) for e in range(4)]
    assert same[EXPERT] and not all(same)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4", "deepseek_v3"])
def test_taken_apart_it_is_the_same_model(family: str, tmp_path: Path) -> None:
    source = saved(family, tmp_path / "float")
    model, experts = load_apart(Checkpoint.open(source))
    ids = text(count=2).ids
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids)[0], spicerack.load(source)(input_ids=ids)[0], atol=1e-6)
    stacks = [m for m in model.modules() if isinstance(m, ExpertStack)]
    assert stacks and experts.keys() == {
        f"{path}.{e}.{p}" for path, stack in model.named_modules() if isinstance(stack, ExpertStack)
        for e in range(len(stack)) for p in range(len(stack.parts(e)))
    }  # fmt: skip


@pytest.mark.parametrize("family", ["gpt_oss", "llama4", "granitemoe", "qwen3_moe", "deepseek_v3"])
def test_calibrated_mixtures_get_nearer_to_the_float_model(family: str, tmp_path: Path) -> None:
    families.build(family).save_pretrained(tmp_path / "float")
    exact = spicerack.load(tmp_path / "float", dtype=torch.float32)
    errors = []
    for chain in ("rtn", "gptq"):
        run(tmp_path / "float", tmp_path / chain, "w2g8", chain, count=60)
        small = spicerack.load(tmp_path / chain, compute="float", dtype=torch.float32)
        with torch.no_grad():
            ids = text(count=60).ids
            errors.append(float((small(input_ids=ids)[0] - exact(input_ids=ids)[0]).square().mean()))
    assert errors[1] < 0.8 * errors[0]
