"""Layers that are never called, and whose weight counts all the same: Mamba's code multiplies by `dt_proj.weight`."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from ggufs import byte_pieces
from torch import nn

import spicerack
from spicerack.evaluation.reference import warn_of_unreached_layers
from spicerack.models.blocks.reads import Reads
from spicerack.models.inputs import check_text
from spicerack.text.calibration import Calibration


@pytest.fixture(scope="module")
def mamba(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny Mamba, and what gptq made of it."""
    place = tmp_path_factory.mktemp("mamba")
    tiny.build("mamba").save_pretrained(place / "float")
    byte_pieces().save_pretrained(place / "float")
    ids = torch.randint(3, 250, (4, 24), generator=torch.Generator().manual_seed(0))
    text = Calibration(ids, None, "of no text", 0.0, "made up")
    spicerack.quantize(place / "float", "w4g16", method="gptq", calibration=text, output=place / "out", fit_groups=True)
    return place / "float", place / "out"


def test_the_ledger_says_what_is_true_of_them(mamba: tuple[Path, Path]) -> None:
    """That text reaches their weight, and that what it is multiplied with is not seen."""
    tensors = json.loads((mamba[1] / "spicerack.json").read_text())["tensors"]
    events = {
        entry["tensor"].split(".")[-2]: entry.get("events", []) for entry in tensors if "mixer" in entry["tensor"]
    }
    assert "multiplies by its weight and does not call it" in events["dt_proj"][0]
    assert events["x_proj"] == events["in_proj"] == []


def test_they_are_in_the_figures(mamba: tuple[Path, Path]) -> None:
    """So that nobody is told that what was lost there is not."""
    reached = check_text(spicerack.load(mamba[0]), head=True)
    assert "backbone.layers.1.mixer.dt_proj" in reached and "backbone.layers.1.mixer.x_proj" in reached
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_unreached_layers(spicerack.load(mamba[1]), reached)
    with pytest.warns(UserWarning, match="text does not run 2 of"):
        warn_of_unreached_layers(
            spicerack.load(mamba[1]), frozenset(name for name in reached if not name.endswith("dt_proj"))
        )


def test_reads_are_of_any_function_and_of_all_names() -> None:
    used, unused = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    with Reads({"a": used, "b": used, "c": unused}) as reads:
        torch.cat([torch.zeros(1, 2), used.float() @ torch.ones(2, 2)])
    assert reads.given == {"a", "b"}
