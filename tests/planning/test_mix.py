"""`quantize` with a budget, from a model to its folder: what is estimated, what is kept, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from calibrations import text

import spicerack
from spicerack.errors import OutputError, TextError, UsageError
from spicerack.evaluation import language
from spicerack.models.blocks.find import find
from spicerack.numerics import codec, rounding
from spicerack.numerics.scheme import parse
from spicerack.planning import sensitivity
from spicerack.planning.budget import budget_of
from spicerack.planning.mix import fisher as fishers
from spicerack.planning.mix import judge, known, units
from spicerack.planning.mix import order as orders
from spicerack.planning.mix import run as mixing
from spicerack.quantization import job as jobs
from spicerack.quantization.calibration.targets import tensors_of
from spicerack.quantization.recipe import Recipe, decided, rule
from spicerack.quantization.stream import Means
from spicerack.quantization.watch import Watch
from spicerack.runtime.load import load, load_apart
from spicerack.storage import ledger, records
from spicerack.text.windows import Window

TEXT = text(count=16)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    families.build("llama").save_pretrained(folder)
    return folder


def gradients(folder: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[fishers.Fisher, fishers.Fisher]:
    """F of every layer by its path in the model: as it is computed, and by one backward pass through all of it."""
    asked = decided(units.listing(Recipe(parse("w8"))), True)
    job = jobs.prepare(folder, asked, with_text=True)
    model, experts = load_apart(job.source)
    stack = find(model)
    drawn: list[torch.Tensor] = []

    def labels(logits: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, int]:
        rows = logits.flatten(0, -2)
        drawn.append(torch.randint(rows.shape[-1], (len(rows),), generator=generator))
        return torch.nn.functional.cross_entropy(rows, drawn[-1], reduction="sum"), len(rows)

    monkeypatch.setattr(fishers, "_by_labels", labels)
    tensors = tensors_of(stack, experts, job)
    cpu = torch.device("cpu")
    blocks = fishers.fisher(stack, tensors, TEXT, path, cpu, None, lambda *_: None)
    assert not list(path.iterdir())
    ours = {f"{stack.name(i)}.{name}": values for i, block in enumerate(blocks) for name, values in block.items()}
    whole = load(folder, dtype=torch.float32)
    sums: dict[str, torch.Tensor] = {}
    for name in ours:

        def look(_m: Any, _i: Any, out: torch.Tensor, name: str = name) -> None:
            out.register_hook(lambda g: sums.__setitem__(name, g.flatten(0, -2).square().sum(0)))  # fmt: skip

        whole.get_submodule(name).register_forward_hook(look)
    with torch.enable_grad():
        logits = whole(input_ids=TEXT.ids, use_cache=False).logits.flatten(0, -2)
        torch.nn.functional.cross_entropy(logits, torch.cat(drawn), reduction="sum").backward()
    return ours, {name: values / TEXT.ids.numel() for name, values in sums.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradients_block_by_block_are_those_of_the_whole(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    families.build(family).save_pretrained(tmp_path / "model")
    (tmp_path / "states").mkdir()
    ours, whole = gradients(tmp_path / "model", tmp_path / "states", monkeypatch)
    assert len(ours) >= 8
    for name, values in ours.items():
        torch.testing.assert_close(values, whole[name], rtol=1e-3, atol=1e-9)


class Stopping(Watch):
    """Asks for an end behind the first block."""

    def stopping(self) -> bool:
        return True


def order(folder: Path, output: Path, method: str | None = "rtn", **budget: Any) -> orders.Order:
    asked = budget_of(**budget)
    assert asked is not None
    recipe = Recipe(parse("w8")).with_choices(None, method, None)
    return orders.Order(folder, output, asked, recipe, "normal", TEXT, Means(threads=1))


def run(asked: orders.Order, watch: Watch = Watch()) -> tuple[mixing.Outcome, list[str]]:  # noqa: B008  # no state
    told: list[str] = []
    return mixing.run(orders.prepare(asked), watch, told.append), told


def test_estimates_are_by_the_error_of_the_codes(llama: Path, tmp_path: Path) -> None:
    outcome, _ = run(order(llama, tmp_path / "out", bits=5))
    prepared = orders.prepare(order(llama, tmp_path / "other", bits=5))
    model = load(llama, dtype=torch.float32)
    unit = next(u for u in outcome.known.units if u.name == "model.layers.1.mlp.down_proj")
    rows: list[torch.Tensor] = []
    layer = model.get_submodule(unit.name)
    layer.register_forward_pre_hook(lambda _m, inputs: rows.append(inputs[0].flatten(0, -2)))
    with torch.no_grad():
        model(input_ids=prepared.text.ids)
    x = torch.cat(rows)
    (tmp_path / "states").mkdir()
    apart, experts = load_apart(prepared.listing.source)
    stack = find(apart)
    tensors = tensors_of(stack, experts, prepared.listing)
    minds = fishers.fisher(
        stack, tensors, prepared.text, tmp_path / "states", torch.device("cpu"), None, lambda *_: None
    )[1]["mlp.down_proj"]
    for name, option in unit.schemes.items():
        w = layer.weight.detach()
        q = rounding.to_nearest(w, parse(name), importance=x.square().mean(0))
        wrong = (codec.decode(q) - w) @ x.T
        assert option.estimate == pytest.approx(0.5 * float(minds @ wrong.square().mean(1)), rel=1e-3)
    losses = [option.estimate for option in unit.schemes.values()]
    assert losses[0] > 10 * losses[-1] == 10 * min(losses)


def test_a_folder_of_a_budget_says_what_it_is_and_the_next_one_is_quick(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    size = orders.prepare(order(llama, out, bits=5)).sizes
    prepared = orders.prepare(order(llama, out, bits=5))
    low, high = (size({u.name: u.schemes[end].name for u in prepared.choices.units}).files for end in (0, -1))
    asked = (low + high) // 2
    outcome, _ = run(order(llama, out, size=asked))
    weights = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert (
        0.98 * asked < weights <= asked
        and weights == prepared.sizes({u.name: u.chosen for u in outcome.known.units}).files
    )
    assert sensitivity.read(out) == outcome.known
    written = ledger.read(out)
    assert written is not None and written.budget == json.loads(json.dumps(outcome.as_dict()["budget"]))
    schemes = {entry.tensor: entry.scheme for entry in written.entries if entry.scheme}
    for unit in outcome.known.units:
        assert {schemes[tensor] for tensor in unit.tensors} == {unit.chosen}
    assert json.loads((out / "run.json").read_text())["output"] == str(out)
    seen = records.read(out, "lens")
    assert seen is not None and seen["result"]["tensor"] in schemes
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    # what was measured is what the folder loses on that text
    windows = [Window(ids, 0, 1.0) for ids in prepared.judge.text.ids]
    compared = language.compare(load(llama, dtype=torch.float32), load(out), windows)
    assert outcome.known.rounds[-1].measured == pytest.approx(compared.mean, rel=1e-6)

    again, _ = run(order(llama, out, size=asked))
    assert again.summary.already_there and again.known == outcome.known
    with pytest.raises(OutputError, match="from another command"):
        run(order(llama, out, bits=4))
    monkeypatch.setattr(known, "fisher", None)  # estimates are those of the folder beside it
    other, told = run(order(llama, tmp_path / "other", bits=4))
    assert any("sensitivity is that of" in sentence for sentence in told)
    assert other.summary.sizes.bits_per_weight <= 4


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_to_the_same_bytes(llama: Path, tmp_path: Path) -> None:
    whole, _ = run(order(llama, tmp_path / "a" / "out", bits=4))
    for _ in range(2):  # behind the first block, twice: the second call begins at the next
        with pytest.raises(KeyboardInterrupt):
            run(order(llama, tmp_path / "b" / "out", bits=4), Stopping())
    resumed, _ = run(order(llama, tmp_path / "b" / "out", bits=4))
    assert resumed.known == whole.known
    names = ("model.safetensors", "spicerack.json", "sensitivity.json", "config.json")
    for name in names:
        assert (tmp_path / "a" / "out" / name).read_bytes() == (tmp_path / "b" / "out" / name).read_bytes()


def test_what_matters_gets_more_bits_and_what_does_not_the_fewest(tmp_path: Path) -> None:
    model = families.build("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight *= 30
        model.model.layers[1].self_attn.v_proj.weight.zero_()  # so that nothing reaches o_proj
    model.save_pretrained(tmp_path / "model")
    outcome, _ = run(order(tmp_path / "model", tmp_path / "out", bits=4.5))
    bits = {u.name: u.schemes[u.chosen].bits / u.weights for u in outcome.known.units}
    least = {u.name: min(o.bits for o in u.schemes.values()) / u.weights for u in outcome.known.units}
    planted, dead = "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj"
    assert bits[planted] == max(bits.values()) > bits["model.layers.1.mlp.down_proj"]
    assert bits[dead] == least[dead]


def test_transforms_and_rules_are_in_the_folder(
    tmp_path: Path,
) -> None:
    families.build("llama").save_pretrained(tmp_path / "model")
    plain = order(tmp_path / "model", tmp_path / "out", "awq+gptq", bits=4.5)
    ruled = plain.recipe.then([rule("**.0.mlp.down_proj=w8"), rule("model.embed_tokens=w8")])
    outcome, _ = run(dataclasses.replace(plain, recipe=ruled))
    written = ledger.read(tmp_path / "out")
    assert written is not None and "awq+gptq" in str(written.identity["recipe"])
    schemes = {entry.tensor: entry.scheme for entry in written.entries}
    assert schemes["model.layers.0.mlp.down_proj.weight"] == schemes["model.embed_tokens.weight"] == "w8"
    assert outcome.summary.sizes.bits_per_weight <= 4.5
    assert outcome.known.rounds[-1].bits == pytest.approx(outcome.summary.sizes.bits_per_weight)


def test_a_text_beside_the_model_judges_and_leaves_calibration_its_own(stdlib_lm: Path, tmp_path: Path) -> None:
    prepared = orders.prepare(order(stdlib_lm, tmp_path / "out", bits=4))
    assert prepared.text is TEXT and prepared.judge.text.ids.shape == (32, 512)
    assert any("heldout.txt" in note for note in prepared.notes)
    assert judge.with_held_out(64, stdlib_lm) == 64 and judge.with_held_out(64, tmp_path) == 85
    mine, held = judge.split(TEXT)
    assert len(mine.ids) == 12 and len(held.ids) == 4
    rows = {tuple(row.tolist()) for row in mine.ids} | {tuple(row.tolist()) for row in held.ids}
    assert rows == {tuple(row.tolist()) for row in TEXT.ids}


def test_an_encoder_is_bounded_by_its_embeddings(tmp_path: Path) -> None:
    families.build("bert").save_pretrained(tmp_path / "model")
    asked = order(tmp_path / "model", tmp_path / "out", max_loss="2%")
    with pytest.raises(UsageError, match="is an encoder"):
        orders.prepare(order(tmp_path / "model", tmp_path / "out", max_kl=0.1))
    outcome, _ = run(asked)
    last = outcome.known.rounds[-1]
    assert outcome.known.metric == "cosine" and last.rise is None and 0 < last.interval[1] <= 0.02


def refused(folder: Path, **given: Any) -> UsageError:
    with pytest.raises(UsageError) as error:
        spicerack.quantize(folder, **given)
    return error.value


def test_what_leaves_no_choice_or_no_text_is_refused(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    usual: Mapping[str, Any] = {"output": out, "calibration": TEXT}
    assert "chooses the scheme" in str(refused(llama, scheme="w4", bits=4, **usual))
    assert "neither a scheme nor a budget" in str(refused(llama, **usual))
    assert "--size and --bits" in str(refused(llama, bits=4, size="4GB", **usual))
    assert "needs text" in str(refused(llama, bits=4, output=out))
    assert "below the smallest" in str(refused(llama, bits=1.5, **usual))
    assert "has a choice" in str(refused(llama, bits=4, rules=["**=w8"], **usual))
    assert "effort high" in str(refused(llama, bits=4, effort="high", **usual))
    with pytest.raises(UsageError, match="for folders"):
        spicerack.quantize(torch.nn.Linear(64, 64), bits=4)  # type: ignore[call-overload]
    with pytest.raises(TextError, match="needs 8"):
        spicerack.quantize(llama, bits=4, output=out, calibration=text(count=7))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ({"size": "4.2GB"}, 4_200_000_000), ({"size": "4.2 gb"}, 4_200_000_000), ({"size": "4200MB"}, 4_200_000_000),
        ({"size": "4GiB"}, 4 << 30), ({"size": " 512 KiB "}, 512 << 10), ({"size": 12345}, 12345), ({"size": "1k"}, 0),
        ({"size": "0"}, 0), ({"size": "-1GB"}, 0), ({"size": "nan"}, 0), ({"size": "4 GB 2"}, 0),
        ({"size": "9" * 30}, 0),
        ({"bits": 3.5}, 3.5), ({"bits": 0}, 0), ({"bits": -1.0}, 0), ({"bits": float("nan")}, 0), ({"bits": 17}, 0),
        ({"max_kl": 0.01}, 0.01), ({"max_kl": float("inf")}, 0), ({"max_loss": "1%"}, 0.01),
        ({"max_loss": "1 %"}, 0.01),
        ({"max_loss": 0.01}, 0.01), ({"max_loss": "1e-3"}, 0.001), ({"max_loss": 1}, 0), ({"max_loss": "100%"}, 0),
        ({"max_loss": "-1%"}, 0), ({"max_loss": "%"}, 0), ({"max_loss": "nan"}, 0),
    ],
)  # fmt: skip
def test_budgets_as_people_write_them(given: dict[str, Any], value: float) -> None:
    if value:
        budget = budget_of(**given)
        assert budget is not None and budget.value == pytest.approx(value)
    else:
        with pytest.raises(UsageError, match=f"--{next(iter(given)).replace('_', '-')} "):
            budget_of(**given)
