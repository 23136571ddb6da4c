"""Meters, from a tree of files as the kernel has them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from spicerack.errors import UsageError
from spicerack.machine.energy import Counter, Meter, nvml, rapl, rapl_obstacle, standing_still

RANGE = 262_143_328_850


def zone(folder: Path, name: str, joules: float) -> Path:
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text(f"{round(joules * 1e6)}\n")
    (folder / "max_energy_range_uj").write_text(f"{RANGE}\n")
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two packages, of which one has cores and DRAM, shown beside it, too; psys; a second way to the first package."""
    real, root = tmp_path / "devices", tmp_path / "powercap"
    root.mkdir()
    (root / "intel-rapl").mkdir()
    top = zone(real / "intel-rapl:0", "package-0", 100)
    inner = [zone(top / f"intel-rapl:0:{i}", name, 10 * i + 1) for i, name in enumerate(("core", "dram"))]
    others = [
        zone(real / "intel-rapl:1", "package-1", 262_140), zone(real / "intel-rapl:2", "psys", 7),
        zone(real / "intel-rapl-mmio:0", "package-0", 100),
    ]  # fmt: skip
    for path in (top, *inner, *others):
        (root / path.name).symlink_to(path)
    return root


def test_what_is_part_of_another_is_not_added(root: Path) -> None:
    assert rapl_obstacle(root) is None
    assert {c.name: c.read() for c in rapl(root)} == {"package-0": 100, "package-1": 262_140, "dram of package-0": 11}


def test_counters_begin_anew(root: Path) -> None:
    meter = Meter(rapl(root))
    (root / "intel-rapl:1/energy_uj").write_text("6671150")  # 3.32885 J to the range, 6.67115 behind it
    (root / "intel-rapl:0/energy_uj").write_text("130000000")
    joules = meter.sample()
    assert joules["package-0"] == 30 and joules["dram of package-0"] == 0
    assert joules["package-1"] == pytest.approx(10, abs=1e-6)
    (root / "intel-rapl:1/energy_uj").write_text("7671150")
    assert meter.sample()["package-1"] == pytest.approx(11, abs=1e-6)


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_refusal_of_a_real_file(root: Path) -> None:
    (root / "intel-rapl:0/energy_uj").chmod(0)
    assert "intel-rapl:0/energy_uj may not be read" in (rapl_obstacle(root) or "")


def test_refusal_names_the_file_and_the_way(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Path.read_text

    def refuse(path: Path, *args: str) -> str:
        if path.name == "energy_uj":
            raise PermissionError(path)
        return read(path, *args)

    monkeypatch.setattr(Path, "read_text", refuse)
    reason = rapl_obstacle(root)
    assert reason is not None and f"{root}/intel-rapl:0/energy_uj may not be read" in reason and "chmod" in reason


def test_no_meter(tmp_path: Path, root: Path) -> None:
    assert "no RAPL" in (rapl_obstacle(tmp_path / "nowhere") or "")
    (tmp_path / "empty").mkdir()
    assert "virtual machines" in (rapl_obstacle(tmp_path / "empty") or "")
    (root / "intel-rapl:0/energy_uj").write_text("many")
    assert "does not hold a number" in (rapl_obstacle(root) or "")


def test_a_counter_without_a_range_does_not_run_backwards() -> None:
    values = iter((5.0, 4.0))
    meter = Meter([Counter("card", lambda: next(values))])
    with pytest.raises(UsageError, match="ran backwards"):
        meter.sample()


def test_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refused(Exception):
        pass

    def energy(handle: int) -> int:
        if handle == 9:
            raise Refused
        return 1500 + handle

    library = SimpleNamespace(
        NVMLError=Refused, nvmlInit=lambda: None, nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda i: i, nvmlDeviceGetName=lambda handle: f"Card {handle}".encode(),
        nvmlDeviceGetTotalEnergyConsumption=energy, __spec__=SimpleNamespace(),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", library)
    assert [(c.name, c.read()) for c in nvml()] == [("Card 0 (0)", 1.5), ("Card 1 (1)", 1.501)]
    monkeypatch.setattr(library, "nvmlDeviceGetHandleByIndex", lambda i: 9)
    assert nvml() == ()
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert nvml() == ()


def test_counters_that_stand_still_measure_nothing(root: Path) -> None:
    counters = rapl(root)
    told = standing_still(counters, lambda _seconds: None)
    assert told is not None and "package-0" in told and "stand still" in told

    def work(_seconds: float) -> None:
        (root / "intel-rapl:1" / "energy_uj").write_text("262140000001")

    assert standing_still(counters, work) is None
