"""`spicerack energy`: a figure with its label, from a meter that counts as it is told, or from the model of power."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from conftest import LlamaFolder

import spicerack
from spicerack.cli import _output, cli
from spicerack.errors import UsageError
from spicerack.evaluation.energy import EnergyOptions, measure
from spicerack.machine import energy
from spicerack.machine.catalogue import Device
from spicerack.machine.energy import Counter
from spicerack.planning.energy import memory_of
from spicerack.planning.written import open_written


@pytest.fixture
def out(llama_folder: LlamaFolder, tmp_path: Path) -> Path:
    spicerack.quantize(llama_folder(), "w4g32", output=tmp_path / "out")
    return tmp_path / "out"


def test_idle_is_subtracted(out: Path) -> None:
    """A clock that jumps a second when it is read, and a meter of 5 W when idle and 20 at work."""
    time, slept = [0.0], [math.inf]

    def clock() -> float:
        time[0] += 1
        return time[0]

    def sleep(seconds: float) -> None:
        time[0] += seconds
        slept[0] = time[0]

    def read() -> float:
        return 5 * min(time[0], slept[0] + 1) + 20 * max(time[0] - slept[0] - 1, 0)

    result = measure(out, [Counter("package-0", read)], options=EnergyOptions(seconds=3), sleep=sleep, clock=clock)
    assert result.idle_watts["package-0"] == pytest.approx(5) and result.turns == 3 and result.seconds == 3
    # three readings of the clock, of which the meter has seen two when it is read the last time
    assert result.joules["package-0"] == pytest.approx(40)
    assert result.joules_per_token * result.tokens == pytest.approx(40 - 3 * 5)
    assert result.joules_per_token_with_idle * result.tokens == pytest.approx(40)
    assert json.loads(json.dumps(result.as_dict()))["how"] == "measured"


def test_a_machine_that_is_busy_while_it_idles_measures_nothing(out: Path) -> None:
    """Else joules per token are below 0, and called measured."""
    reads = iter(range(1000))

    def read() -> float:
        at = next(reads)
        return 100.0 * min(at, 1) + max(at - 1, 0)  # 100 J while it idles, then 1 J at each reading

    time = iter(range(1000))
    with pytest.raises(UsageError, match="while the model was idle, and no more"):
        measure(
            out, [Counter("package-0", read)], options=EnergyOptions(seconds=3), sleep=lambda _: None,
            clock=lambda: float(next(time)),
        )  # fmt: skip


def test_counters_that_stand_still_are_told_and_it_is_estimated(
    out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(energy, "rapl_obstacle", lambda: None)
    monkeypatch.setattr(energy, "rapl", lambda: (Counter("package-0", lambda: 7.0),))
    result = run(capsys, "energy", str(out), "--watts", "65")
    assert result["how"] == "estimated" and "stand still" in str(result["not_measured"])


def run(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, object]:
    assert _output.run(cli, [*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert isinstance(result, dict)
    return result


def test_estimate_is_power_times_time(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(capsys, "energy", str(out), "--fit", "3090")
    assert result["how"] == "estimated" and result["watts"] == 350 and result["not_measured"]
    model, _ = open_written(out)
    assert result["macs"] == model.read
    floor = result["read_bytes"] * 8 * 7.5e-12 + model.read * 4.6e-12  # type: ignore[operator]
    assert result["floor_joules_per_token"] == pytest.approx(floor)
    assert result["joules_per_token"] == pytest.approx(0.6 * 350 / result["tokens_per_s"])  # type: ignore[operator]
    assert json.loads((out / "energy.json").read_text())["result"] == result
    twice = run(capsys, "energy", str(out), "--fit", "3090", "--watts", "700")
    assert twice["joules_per_token"] == pytest.approx(2 * result["joules_per_token"])  # type: ignore[operator]


def test_the_bytes_are_those_of_the_files(out: Path) -> None:
    from spicerack.planning.precisions import weighed

    model, precision = open_written(out)
    ledger = json.loads((out / "spicerack.json").read_text())["tensors"]
    assert weighed(model, precision).file == sum(entry["bytes_after"] for entry in ledger)


def test_a_device_of_unknown_power_has_a_floor(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(capsys, "energy", str(out), "--fit", "Shared VM")
    assert result["joules_per_token"] is None and result["floor_joules_per_token"] > 0  # type: ignore[operator]
    assert _output.run(cli, ["energy", str(out), "--fit", "Shared VM"]) == 0
    printed = capsys.readouterr().out
    assert "at least" in printed and "--watts" in printed and "estimated" in printed


@pytest.mark.parametrize("number", ["nan", "inf", "-inf", "0", "-1", "x"])
def test_watts_are_a_number(number: str, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """click lets "nan" through every range; nothing is kept then."""
    for option in (f"--watts={number}", f"--seconds={number}"):
        assert _output.run(cli, ["energy", str(out), option]) == 2
        assert option.partition("=")[0] in capsys.readouterr().err
    assert not (out / "energy.json").exists()


def test_refusals(out: Path, llama_folder: LlamaFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert _output.run(cli, ["energy", str(out), "--fit", "2x3090"]) == 2
    assert "one device" in capsys.readouterr().err
    assert _output.run(cli, ["energy", str(llama_folder()), "--fit", "3090"]) == 2
    assert "spicerack.json" in capsys.readouterr().err


def test_kinds_of_memory() -> None:
    assert memory_of(Device("H100", "gpu", 80, 80, arch="sm90")) == "hbm"
    assert memory_of(Device("3090", "gpu", 24, 24, arch="sm86")) == "gddr"
    assert memory_of(Device("M4", "soc", 24, 16, arch="metal")) == "lpddr"
    assert memory_of(Device("Ryzen", "cpu", 24, 16)) == "ddr"
