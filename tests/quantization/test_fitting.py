"""Narrow layers: what is offered can be pasted, and gives what --fit-groups gives; nothing is fitted in silence."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import spicerack
from spicerack.cli import cli
from spicerack.errors import ShapeError
from spicerack.models.narrow import nearest
from spicerack.models.overview import look
from spicerack.numerics.scheme import parse
from spicerack.quantization import recipe
from spicerack.quantization.fitting import patterns
from spicerack.storage.reader import Checkpoint


@pytest.mark.parametrize(("asked", "columns", "fits"), [
    ("w4g128", 64, "w4"), ("w4g128", 172, "w4"), ("w4g128", 576, "w4g64"), ("w4g128", 2880, "w4g64"),
    ("w4g128", 48, "w4"), ("w4g128", 176, "w4g16"), ("w4g64", 2700, "w4"), ("w2g32h", 48, "w2g16h"),
    ("w4g128z", 192, "w4g64z"), ("w8g128a8", 40, "w8a8"), ("nf4", 96, "w4g32"), ("mxfp4", 172, "w4"),
])  # fmt: skip
def test_the_nearest_scheme_fits_is_of_the_same_kind_and_costs_at_most_a_bit_more(
    asked: str, columns: int, fits: str
) -> None:
    scheme, shape = parse(asked), (64, columns)
    with pytest.raises(ShapeError):
        scheme.check_shape("layer", shape)
    found = nearest(scheme, shape)
    assert found is not None and found.name == fits
    found.check_shape("layer", shape)
    weights = 64 * (scheme.group_columns or 1)
    nominal = scheme.stored_bits((64, scheme.group_columns or 1)) / weights
    assert found.stored_bits(shape) / (64 * columns) <= nominal + 1
    assert (found.activations, found.zero) == (scheme.activations, scheme.zero)


def test_patterns_touch_nothing_else() -> None:
    every = [f"layers.{i}.{name}" for i in range(3) for name in ("up", "down", "gate")] + ["0", "1", "head"]
    assert patterns([f"layers.{i}.{n}" for i in range(3) for n in ("up", "down")], every) == ["layers.*.{up,down}"]
    assert patterns(["layers.1.up", "0", "1"], every) == ["layers.1.up", "{0,1}"]
    for these in (["layers.0.up", "layers.1.down"], ["head", "layers.2.gate"]):
        rules = [recipe.rule(f"{pattern}=w4") for pattern in patterns(these, every)]
        assert {name for name in every if any(rule.matches(name) for rule in rules)} == set(these)


def test_what_the_error_prints_can_be_pasted(llama_folder, tmp_path: Path) -> None:
    """Of layers with K = 64 and 176, under a group of 128 which only the wider embedding would have."""
    folder = str(llama_folder(intermediate_size=176))
    command = ["quantize", folder, "--scheme", "w4g128", "-o"]
    refused = CliRunner().invoke(cli, [*command, str(tmp_path / "a")])
    assert isinstance(refused.exception, ShapeError)
    pasted = re.findall(r"--set '([^']+)'", refused.exception.hint)
    assert pasted and "--fit-groups" in refused.exception.hint
    by_rules = CliRunner().invoke(cli, [*command, str(tmp_path / "a"), *(f"--set={rule}" for rule in pasted)])
    by_flag = CliRunner().invoke(cli, [*command, str(tmp_path / "b"), "--fit-groups"])
    assert (by_rules.exit_code, by_flag.exit_code) == (0, 0)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    assert re.search(r"14 layers|12 layers", by_flag.output) and "w4g16" in by_flag.output
    estimate = next(e for e in look(folder).estimates if e.scheme == "w4g128")
    written = sum(info.nbytes for info in Checkpoint.open(tmp_path / "b").tensors.values())
    assert written == estimate.nbytes


def test_modules_and_recipe_files_fit_as_well_and_say_so(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 172), nn.GELU(), nn.Linear(172, 64))
    with pytest.raises(
        ShapeError,
        match=r"2\.weight: K=172 .*w4 fits \(fit_groups=True \(--fit-groups\) or, .* rules=\['2=w4'\] \(--set\)",
    ):
        spicerack.quantize(net, "w4g32")
    pasted = spicerack.quantize(net, "w4g32", rules=["2=w4"])
    with pytest.warns(UserWarning, match=r"groups do not tile 2: w4g32 -> w4"):
        fitted = spicerack.quantize(net, "w4g32", fit_groups=True)
    x = torch.randn(3, 64)
    assert torch.equal(fitted(x), pasted(x))
    (tmp_path / "recipe.yaml").write_text("scheme: w4g32\nfit_groups: true\n")
    read = recipe.read(tmp_path / "recipe.yaml")
    assert read.fit_groups and read.as_dict()["fit_groups"] is True and "fit-groups" in str(read)
    with pytest.warns(UserWarning, match="groups do not tile"):
        assert torch.equal(spicerack.quantize(net, read)(x), pasted(x))
