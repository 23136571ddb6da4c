"""Which families mlx-lm loads of what is written here: `formats`, `--for mlx` and `export --to mlx` say the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from ggufs import folder

import spicerack
from spicerack.errors import SchemeError, UsageError
from spicerack.exports.survey import formats
from spicerack.planning import engine as planned
from spicerack.storage.engine import find

WAY = find("mlx").reads[0]
LOADED = sorted(WAY.loaded or ())


@pytest.mark.interop
@pytest.mark.parametrize("family", LOADED)
def test_mlx_lm_loads_a_model_of_each_family_that_is_said_to_load(family: str, tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm")
    if family in ("qwen2_moe", "qwen3_moe", "granitemoe", "mixtral"):
        source = folder(family)
    else:
        source = tmp_path / "float"
        tiny.build(family).save_pretrained(source)
    spicerack.quantize(source, "w4g32", for_="mlx", fit_groups=True, output=tmp_path / "q")
    assert {line.verdict for line in formats(tmp_path / "q").lines if line.engine == "mlx"} == {"exact"}
    assert spicerack.export(tmp_path / "q", to="mlx", for_="mlx", output=tmp_path / "mlx").foreign


def test_what_mlx_lm_does_not_load_is_refused_at_every_door(tmp_path: Path) -> None:
    """gpt-oss, before a byte is written, whether mlx-lm is installed or not; and the planner asks the same list."""
    reason = dict(WAY.refused)["gpt_oss"]
    with pytest.raises(UsageError, match=reason):
        spicerack.quantize(folder("gpt_oss"), "w4g32", for_="mlx", output=tmp_path / "q")
    spicerack.quantize(folder("gpt_oss"), "w4g32", rules=["**.experts.*=skip"], output=tmp_path / "q")
    for to_engine in ("mlx", None):
        with pytest.raises((UsageError, SchemeError), match=reason):
            spicerack.export(tmp_path / "q", to="mlx", for_=to_engine, output=tmp_path / "mlx")
    for model in (tmp_path / "q", folder("gpt_oss")):
        survey = formats(model)
        said = [line.reasons for line in survey.lines if line.engine == "mlx"]
        said += [(choice.reason,) for choice in survey.choices if choice.engine == "mlx"]
        assert said == [(reason,)]
    assert planned.get("mlx").only == frozenset(WAY.known or ())
    assert set(dict(WAY.refused)) | set(LOADED) <= set(WAY.known or ())


def test_a_family_of_which_nothing_was_loaded_is_told(tmp_path: Path) -> None:
    assert WAY.doubt("mlx", "llama") is None and "no model of it was loaded" in str(WAY.doubt("mlx", "smollm3"))
    result = spicerack.quantize(folder("smollm3"), "w4g32", for_="mlx", output=tmp_path / "q")
    assert any("no model of it was loaded" in note for note in result["notes"])
    (line,) = [line for line in formats(tmp_path / "q").lines if line.engine == "mlx"]
    assert any("no model of it was loaded" in reason for reason in line.reasons)
