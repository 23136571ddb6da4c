"""A new solver, transform or observer is one file: dropped into a folder, it is run from its name to bytes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import families
import pytest
import torch
from calibrations import saved, text, uneven_llama
from dropped import dropped
from folders import codes
from safetensors.torch import load_file

import spicerack
from spicerack.algorithms import method, solver, solvers, transform, transforms
from spicerack.cli import _output, cli
from spicerack.errors import RecipeError, UsageError
from spicerack.numerics import rounding
from spicerack.numerics.levels import TableLevels
from spicerack.numerics.scheme import Scheme, parse
from spicerack.quantization import memory
from spicerack.quantization.calibration import observers
from spicerack.quantization.job import Job, prepare
from spicerack.quantization.recipe import Recipe, decided

Drop = Callable[[ModuleType, str, str], None]
"""Folder of plug-ins, name of the new one, its file's text."""


@pytest.fixture
def drop(tmp_path: Path) -> Iterator[Drop]:
    with ExitStack() as stack:

        def add(package: ModuleType, name: str, file: str) -> None:
            folder = tmp_path / "plugins" / name
            folder.mkdir(parents=True)
            stack.enter_context(dropped(package, folder, name, file))

        yield add


def job(source: Path, scheme: str, chain: str) -> Job:
    return prepare(source, decided(Recipe(parse(scheme), method=method.parse(chain)), True))


def entries(folder: Path) -> dict[str, dict[str, Any]]:
    """The ledger by tensor."""
    return {entry["tensor"]: entry for entry in json.loads((folder / "spicerack.json").read_text())["tensors"]}


# ---- those that there are --------------------------------------------------------------------------------------------

TABLE = "its levels are a table, not integers"
QUANTIZED = "its scales are quantized themselves"


@pytest.mark.parametrize(
    ("scheme", "reasons"),
    [
        *((scheme, {}) for scheme in ("w4g32", "w4g32z", "w2g32h", "w8t", "ternary", "w8a8s")),
        *((scheme, dict.fromkeys(("hqq", "signround", "blockap"), TABLE)) for scheme in ("nf4", "fp8", "mxfp4")),
        *((scheme, dict.fromkeys(("hqq", "signround", "blockap"), QUANTIZED)) for scheme in ("q4_k", "nvfp4")),
        ("w4g64m", dict.fromkeys(("hqq", "signround", "blockap"), "its blocks have minima")),
    ],
)
def test_what_each_solver_cannot_do(scheme: str, reasons: dict[str, str]) -> None:
    """And what it says that it cannot is what the documentation says."""
    obstacles = {name: solver.get(name).obstacle(parse(scheme)) for name in solver.names()}
    assert {name: reason for name, reason in obstacles.items() if reason is not None} == reasons


@pytest.mark.parametrize("learner", ["signround", "blockap"])
def test_a_learner_that_cannot_do_a_scheme_says_who_did(learner: str) -> None:
    w, x = torch.randn(8, 256), torch.randn(64, 256)
    solved = solver.solve_weight(learner, w, rounding.to_nearest(w, parse("q4_k")), x.T @ x)
    assert solved.events[0] == f"{learner} cannot do q4_k ({QUANTIZED}): gptq did"
    assert not solver.solve_weight(learner, w, rounding.to_nearest(w, parse("w4g32")), x.T @ x).events


def test_codes_of_several_weights_are_not_walked() -> None:
    """As a codebook's: a column has no code of its own."""

    @dataclasses.dataclass(frozen=True)
    class Pairs(TableLevels):
        weights: int = 2

    pairs = Scheme(name="pairs", levels=Pairs((0.0, 1.0)), group=(1, 32))
    several = "its codes stand for 2 weights each"
    reasons = {"rtn": None, "gptq": several, "hqq": TABLE, "signround": TABLE, "blockap": TABLE}
    assert {name: solver.get(name).obstacle(pairs) for name in solver.names()} == reasons


def test_what_each_plug_in_needs_is_what_its_chain_needs() -> None:
    assert {name for name in solver.names() if not method.parse(name).needs_text} == {"rtn", "hqq"}
    assert {name for name in transform.names() if not method.parse(name).needs_text} == {"hadamard"}
    assert method.parse("hadamard+awq+gptq").rotation == "hadamard" and method.parse("awq").rotation is None


# ---- solvers ---------------------------------------------------------------------------------------------------------

TRUNCATING = '''
"""Rounds towards zero, with the scales of rounding to nearest."""
import dataclasses
import torch
from spicerack.algorithms.solved import Solved
from spicerack.algorithms.solver import WeightSolver

def solve(w, start):
    scale = start.scale.float().repeat_interleave(w.shape[-1] // start.scale.shape[-1], -1)
    levels = start.scheme.levels
    q = torch.trunc(w.float() / scale).clamp(levels.lo, levels.hi).to(start.codes.dtype)
    return Solved(dataclasses.replace(start, codes=q), ("towards zero",))

SOLVER = WeightSolver(
    solve=solve,
    obstacle=lambda scheme: "it has zero points" if scheme.zero else None,
    memory=lambda n, k: (n * k) << 40,
)
'''
TRUNCATED_AND_KEPT = '''
"""Learns nothing from the block, and has only to say where it starts."""
from spicerack.algorithms.solved import Solved
from spicerack.algorithms.solver import BlockSolver

def solve(layers, forward, sequences, told):
    output, target = forward(range(sequences))
    assert output.shape == target.shape and not output.equal(target)
    return {name: Solved(layer.start, (f"{sequences} sequences",)) for name, layer in layers.items()}

SOLVER = BlockSolver(
    solve=solve, starts_from="towards_zero", obstacle=lambda scheme: None, memory=lambda n, k: (n * k) << 41
)
'''


def truncated(source: Path, scheme: str) -> dict[str, torch.Tensor]:
    """By module, the codes that weights of the checkpoint have when they are rounded towards zero."""
    expected = {}
    for name, w in load_file(source / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            start = rounding.to_nearest(w, parse(scheme))
            assert isinstance(start.scale, torch.Tensor)
            whole = torch.trunc(w / start.scale.float().repeat_interleave(16, 1))
            expected[name.removesuffix(".weight")] = whole.clamp(-8, 7).to(torch.int8)
    return expected


def test_a_new_solver_is_one_file(drop: Drop, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = saved("llama", tmp_path / "float"), tmp_path / "out"
    command = ["quantize", str(source), "-o", str(out), "--scheme", "w4g16", "--method", "towards_zero"]
    assert _output.run(cli, command) == 2
    assert "unknown method 'towards_zero'" in capsys.readouterr().err
    drop(solvers, "towards_zero", TRUNCATING)
    with pytest.raises(RecipeError, match=r"solvers blockap, gptq, hqq, rtn, signround, towards_zero\)$"):
        method.parse("zero")
    assert _output.run(cli, command) == 0  # without text, because it needs nothing
    stored, expected = codes(out), truncated(source, "w4g16")
    assert stored.keys() == expected.keys() and len(stored) == 14
    assert all(torch.equal(stored[name], expected[name]) for name in expected)
    assert entries(out)["model.layers.0.mlp.up_proj.weight"]["events"] == ["towards zero"]
    assert json.loads((out / "spicerack.json").read_text())["identity"]["recipe"]["method"] == "towards_zero"


def test_a_new_solver_is_planned_and_called_in_the_loop(drop: Drop, tmp_path: Path) -> None:
    source, out = saved("llama", tmp_path / "float"), tmp_path / "out"
    drop(solvers, "towards_zero", TRUNCATING)
    work = job(source, "w4g16", "awq+towards_zero")
    largest = max(a.info.numel for a in work.actions if a.stored is not None)
    plan = memory.make(work, (12, 24))
    assert plan.where.startswith("while solving") and plan.peak_bytes >> 40 == largest
    with pytest.raises(UsageError, match="needed, while solving"):
        memory.make(work, (12, 24), 1 << 40)
    assert memory.make(work, None).peak_bytes < 1 << 30  # nothing is solved block by block
    spicerack.quantize(source, "w4g16", output=out, method="towards_zero", calibration=text())
    events = [entry["events"] for entry in entries(out).values() if entry["action"] == "quantize"]
    assert events == [["towards zero"]] * 14


def test_what_a_new_solver_cannot_do_is_said_with_its_reason(drop: Drop, tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "float")
    drop(solvers, "towards_zero", TRUNCATING)
    spicerack.quantize(source, "w4g16z", output=tmp_path / "rtn")
    for name, given in (("alone", None), ("in blocks", text())):
        spicerack.quantize(source, "w4g16z", output=tmp_path / name, method="towards_zero", calibration=given)
        event = "towards_zero cannot do w4g16z (it has zero points): rounded to nearest"
        assert entries(tmp_path / name)["model.layers.1.self_attn.q_proj.weight"]["events"] == [event]
    nearest, kept = codes(tmp_path / "rtn"), codes(tmp_path / "alone")
    assert all(torch.equal(nearest[name], kept[name]) for name in nearest)


def test_a_solver_of_blocks_says_what_it_starts_from(drop: Drop, tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "float")
    drop(solvers, "towards_zero", TRUNCATING)
    drop(solvers, "kept", TRUNCATED_AND_KEPT)
    work = job(source, "w4g16", "kept")
    weights = sum(a.info.numel for a in work.actions if a.stored is not None) // 2  # of one of two blocks
    plan = memory.make(work, (12, 24))
    assert plan.where == "while learning the codes of a block" and plan.peak_bytes >> 41 == weights
    assert method.parse("kept").needs_text and not method.parse("towards_zero").needs_text
    for name in ("towards_zero", "kept"):
        spicerack.quantize(source, "w4g16", output=tmp_path / name, method=name, calibration=text())
    started, kept = codes(tmp_path / "towards_zero"), codes(tmp_path / "kept")
    assert all(torch.equal(started[name], kept[name]) for name in started)
    assert entries(tmp_path / "kept")["model.layers.0.mlp.up_proj.weight"]["events"] == ["towards zero", "12 sequences"]
    # Where the first cannot do the scheme, the second learns from rounding to nearest, and nothing is refused.
    spicerack.quantize(source, "w4g16z", output=tmp_path / "z", method="kept", calibration=text())
    assert entries(tmp_path / "z")["model.layers.0.mlp.up_proj.weight"]["events"] == ["12 sequences"]


# ---- transforms ------------------------------------------------------------------------------------------------------

EVENING = '''
"""Makes all input channels equally large."""
from spicerack.algorithms.transform import Scaling

def candidates(inputs, largest):
    yield inputs.absmax / inputs.absmax.log().mean().exp()

TRANSFORM = Scaling(candidates=candidates, needs=("absmax",), memory=lambda weights, itemsize: weights << 40)
'''
MIRRORING = '''
"""Reverses the order of the residual stream's channels, which is a rotation too."""
from spicerack.algorithms.transform import Rotation

TRANSFORM = Rotation(rotate=lambda x: x.float().flip(-1), memory=lambda weights, itemsize: (weights * itemsize) << 40)
'''


@torch.no_grad()
def off(folder: Path, source: Path) -> float:
    """Relative error of the logits."""
    ids = text(count=4, vocabulary=90).ids
    exact = spicerack.load(source, dtype=torch.float32)(input_ids=ids).logits
    small = spicerack.load(folder, compute="float", dtype=torch.float32)(input_ids=ids).logits
    return float((small - exact).norm() / exact.norm())


def test_a_new_transform_of_blocks_is_one_file(drop: Drop, tmp_path: Path) -> None:
    source = uneven_llama(tmp_path / "float")
    drop(transforms, "evening", EVENING)
    with pytest.raises(RecipeError, match=r"transforms are awq, evening, hadamard, smoothquant; solvers"):
        method.parse("even+rtn")
    assert method.parse("evening").needs_text
    plain, work = (memory.make(job(source, "w3g16", chain), (12, 24)) for chain in ("rtn", "evening"))
    weights = sum(a.info.numel for a in job(source, "w3g16", "rtn").actions if a.stored is not None) // 2
    assert work.peak_bytes - plain.peak_bytes == weights << 40
    for chain in ("rtn", "evening"):
        spicerack.quantize(source, "w3g16", output=tmp_path / chain, method=chain, calibration=text(vocabulary=90))
    assert off(tmp_path / "evening", source) < off(tmp_path / "rtn", source)  # .52 to .85 of it for twelve models
    norm = "model.layers.0.input_layernorm.weight"
    assert entries(tmp_path / "evening")[norm]["events"] == ["divided by factors that the layers behind it have now"]
    gains = [load_file(folder / "model.safetensors")[norm] for folder in (source, tmp_path / "evening")]
    assert float(gains[1].abs().max() / gains[1].abs().min()) < 0.5 * float(gains[0].abs().max() / gains[0].abs().min())


def test_a_new_rotation_is_one_file(drop: Drop, tmp_path: Path) -> None:
    source, out = saved("llama", tmp_path / "float"), tmp_path / "out"
    drop(transforms, "mirror", MIRRORING)
    with pytest.raises(RecipeError, match="mirror rotates the whole model, and comes first"):
        method.parse("awq+mirror")
    assert not method.parse("mirror").needs_text
    plain, work = (memory.make(job(source, "w8", chain), (12, 24)) for chain in ("rtn", "mirror"))
    weights = sum(a.info.numel for a in job(source, "w8", "rtn").actions if a.stored is not None) // 2
    assert work.peak_bytes - plain.peak_bytes == 4 * weights << 40
    spicerack.quantize(source, "w8", output=out, method="mirror")
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"].flip(-1))
    assert off(out, source) < 0.02
    with pytest.raises(RecipeError, match="mirror: the residual stream of GPT2LMHeadModel is not known"):
        spicerack.quantize(saved("gpt2", tmp_path / "gpt2"), "w8", output=tmp_path / "b", method="mirror")


# ---- observers -------------------------------------------------------------------------------------------------------

FOUR_SIGMA = '''
"""T = 4 times the root mean square of all inputs."""
from spicerack.algorithms.stats import tokens
from spicerack.quantization.calibration.observer import scale_for

class FourSigma:
    in_order = True

    def __init__(self):
        self.squares, self.count = 0.0, 0

    def add(self, x, mask=None):
        rows = tokens(x, mask)
        self.squares += float(rows.double().square().sum())
        self.count += rows.numel()

    def share(self, ranks):
        pass

    def scale(self):
        return scale_for(4 * (self.squares / self.count) ** 0.5 if self.count else None)

OBSERVER = FourSigma
'''


def test_a_new_observer_is_one_file(drop: Drop, tmp_path: Path) -> None:
    """The first inputs are known: embeddings of one size, divided by it, times the norm's gains."""
    gains = torch.linspace(-2.5, 2.0, 32)
    model = families.build("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.where(model.model.embed_tokens.weight < 0, -3.0, 3.0))
        model.model.layers[0].input_layernorm.weight.copy_(gains)
    model.save_pretrained(tmp_path / "float")
    options: dict[str, Any] = {"output": tmp_path / "out", "method": "rtn", "calibration": text()}
    with pytest.raises(RecipeError, match="unknown observer 'four_sigma'"):
        spicerack.quantize(tmp_path / "float", "w8a8s", observer="four_sigma", **options)
    drop(observers, "four_sigma", FOUR_SIGMA)
    with pytest.raises(RecipeError, match=r"one of four_sigma, kl, minmax, moving_average, mse, percentile"):
        spicerack.quantize(tmp_path / "float", "w8a8s", observer="sigma", **options)
    spicerack.quantize(tmp_path / "float", "w8a8s", observer="four_sigma", **options)
    stored = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.self_attn.q_proj.input_scale"]
    expected = float((4 * gains.square().mean().sqrt() / 127).half())
    assert float(stored) == pytest.approx(expected, rel=2e-3)  # as float16 or bfloat16 round it, and the norm's epsilon
    ledger = json.loads((tmp_path / "out" / "spicerack.json").read_text())
    assert ledger["identity"]["recipe"]["observer"] == "four_sigma"
