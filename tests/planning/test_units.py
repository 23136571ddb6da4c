"""What goes together, and which schemes it may have: in our formats and for engines."""

from __future__ import annotations

from pathlib import Path

import families
import pytest

from spicerack.errors import UsageError
from spicerack.models.blocks.find import find
from spicerack.numerics.scheme import parse
from spicerack.planning.mix import units
from spicerack.planning.mix.units import Choices
from spicerack.quantization import job as jobs
from spicerack.quantization import recipe
from spicerack.quantization.calibration.targets import tensors_of
from spicerack.quantization.decisions import Source
from spicerack.quantization.recipe import Recipe, decided
from spicerack.runtime.load import load_apart


def choices(folder: Path, *rules: str, for_: str | None = None) -> Choices:
    asked = Recipe(parse("w8"), rules=tuple(map(recipe.rule, rules)), for_=for_)
    job = jobs.prepare(folder, decided(units.listing(asked), True), with_text=True)
    model, experts = load_apart(job.source)
    reached = [target.tensor for block in tensors_of(find(model), experts, job) for target in block.targets]
    chosen = units.choices(job, Source.of(job.source).census.shared_inputs, reached, for_)
    for place in (0, -1):  # bytes and rules are those of the folder that quantize would write, to the byte
        mix = {unit.name: unit.schemes[place].name for unit in chosen.units}
        written = jobs.prepare(folder, decided(units.recipe_of(asked, chosen, mix), True), with_text=True)
        own = {tensor for unit in chosen.units for tensor in unit.tensors}
        nbytes = {a.info.name: sum(t.nbytes for t in a.tensors) for a in written.actions if a.info.name in own}
        for unit in chosen.units:
            assert {written_.stored.scheme.name for written_ in written.actions
                    if written_.info.name in unit.tensors and written_.stored} == {mix[unit.name]}  # fmt: skip
            if written.format.name == "spicerack":
                assert sum(nbytes[t] for t in unit.tensors) == chosen.nbytes[unit.name][mix[unit.name]]
    return chosen


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    families.build("llama").save_pretrained(folder)
    return folder


def test_layers_of_one_input_go_together_and_what_a_rule_names_is_not_there(llama: Path) -> None:
    names = [unit.name for unit in choices(llama, "**.0.**.o_proj=skip", "**.down_proj=w8").units]
    assert names == [
        "model.layers.0.mlp.gate_proj+up_proj", "model.layers.0.self_attn.k_proj+q_proj+v_proj",
        "model.layers.1.mlp.gate_proj+up_proj", "model.layers.1.self_attn.k_proj+q_proj+v_proj",
        "model.layers.1.self_attn.o_proj",
    ]  # fmt: skip


def test_narrow_layers_have_what_fits_them(llama: Path) -> None:
    for unit in choices(llama).units:
        bits = [unit.bits(scheme) for scheme in unit.schemes]
        assert len(bits) >= 5 and bits == sorted(bits)


def test_experts_of_a_block_and_role_go_together(tmp_path: Path) -> None:
    families.build("qwen3_moe").save_pretrained(tmp_path)
    of_experts = [unit for unit in choices(tmp_path).units if "experts" in unit.name]
    assert len(of_experts) == 4 and all(len(unit.tensors) in (1, 4, 8) for unit in of_experts)


@pytest.mark.parametrize(("engine", "widths"), [("vllm", {4, 8}), ("llama.cpp", {2, 3, 4, 5, 6, 8})])
def test_an_engine_has_its_own_schemes(stdlib_lm: Path, engine: str, widths: set[int]) -> None:
    for unit in choices(stdlib_lm, for_=engine).units:
        assert {scheme.bits for scheme in unit.schemes} == widths
        assert len({scheme.stored_bits((4096, 4096)) for scheme in unit.schemes}) == len(unit.schemes)


def test_nothing_to_choose_is_told(llama: Path) -> None:
    with pytest.raises(UsageError, match="has a choice"):
        choices(llama, "**=w8")
