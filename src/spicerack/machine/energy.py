"""Meters of energy that the machine has: RAPL of processors, NVML of NVIDIA's cards.

    Counter    one that only counts up, and begins anew at its range
    rapl       those of packages and of DRAM under /sys/class/powercap
    nvml       those of cards, where pynvml is installed
    standing_still   whether they count at all
    Meter      several of them, read together: joules since it was begun

Domains that are part of another (core and uncore of a package) are never added to it, nor is psys, which contains all.
RAPL is for root alone since Linux 5.10 (CVE-2020-8694): what is refused is said with the file and the way to be let in.
"""

from __future__ import annotations

import importlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from spicerack.errors import UsageError

POWERCAP = Path("/sys/class/powercap")
"""Where Linux has RAPL's counters, Intel's and AMD's alike."""
_MOVES = 0.3
"""Seconds in which a counter moves: RAPL's every millisecond, those of cards every tenth of a second."""
_ZONE = re.compile(r"intel-rapl:\d+(?::\d+)?")
"""A domain or one inside it. `intel-rapl-mmio` shows the same packages once more."""
_COUNTED = re.compile(r"package-\d+(?:-die-\d+)?|dram")
"""Domains that may be added up."""


@dataclass(frozen=True, slots=True)
class Counter:
    """A counter of energy.

    name    for people: package-0, dram of package-0, the name of a card
    read    joules that it has counted
    range_  joules at which it begins anew; None where it does not
    """

    name: str
    read: Callable[[], float]
    range_: float | None = None


@dataclass
class Meter:
    """Counters, read together.

    A counter of RAPL begins anew after 262 kJ, which is 22 minutes at 200 W: `sample` is to be called at least once in
    that time, as often as one likes.
    """

    counters: Sequence[Counter]
    _last: list[float] = field(init=False)
    _joules: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self._last = [counter.read() for counter in self.counters]
        self._joules = [0.0] * len(self.counters)

    def sample(self) -> Mapping[str, float]:
        """Joules by the name of the counter, since the meter was made."""
        for i, counter in enumerate(self.counters):
            now = counter.read()
            step = now - self._last[i]
            if step < 0:
                if counter.range_ is None:
                    raise UsageError(f"the counter of {counter.name} ran backwards", "measure again")
                step += counter.range_
            self._joules[i] += step
            self._last[i] = now
        return {counter.name: joules for counter, joules in zip(self.counters, self._joules, strict=True)}


def rapl(root: Path = POWERCAP) -> tuple[Counter, ...]:
    """The counters of all packages and of their DRAM; to be asked where there is no `rapl_obstacle`."""
    return tuple(
        Counter(name, partial(_joules, zone / "energy_uj"), _joules(zone / "max_energy_range_uj"))
        for name, zone in _zones(root)
    )


def rapl_obstacle(root: Path = POWERCAP) -> str | None:
    """Why RAPL says nothing here, with what helps; None where it does."""
    if not root.is_dir():
        return f"there is no {root}: this system has no RAPL"
    zones = _zones(root)
    if not zones:
        return f"{root} has no package or dram of RAPL: virtual machines and containers are seldom given it"
    for _, zone in zones:
        for path in (zone / "energy_uj", zone / "max_energy_range_uj"):
            try:
                _joules(path)
            except PermissionError:
                return (
                    f"{path} may not be read: only root may since Linux 5.10; for this session "
                    f"`sudo chmod a+r {root}/intel-rapl:*/energy_uj {root}/intel-rapl:*/intel-rapl:*/energy_uj`, "
                    "or run the command as root"
                )
            except (OSError, ValueError) as error:
                return f"{path} does not hold a number: {error}"
    return None


def standing_still(counters: Sequence[Counter], sleep: Callable[[float], None] = time.sleep) -> str | None:
    """Why counters say nothing although they can be read; None where one of them counts. sleep: tests replace it.

    Virtual machines may show the files of RAPL and count nothing: 0 joules per token would be called measured.
    """
    before = [counter.read() for counter in counters]
    sleep(_MOVES)
    if [counter.read() for counter in counters] != before:
        return None
    names = ", ".join(counter.name for counter in counters)
    return f"the counters of {names} stand still: some virtual machines show them, and count nothing"


def nvml() -> tuple[Counter, ...]:
    """A counter for each NVIDIA card; none without pynvml, a driver, or a card that counts (Volta and later)."""
    try:
        library = vars(importlib.import_module("pynvml"))
    except ImportError:
        return ()
    try:
        library["nvmlInit"]()
        handles = [library["nvmlDeviceGetHandleByIndex"](i) for i in range(library["nvmlDeviceGetCount"]())]
        counters = tuple(_card(library, i, handle) for i, handle in enumerate(handles))
        for counter in counters:
            counter.read()
    except library["NVMLError"]:
        return ()
    return counters


def _card(library: Mapping[str, Any], number: int, handle: object) -> Counter:
    """library: pynvml's names, which have no types."""
    name = library["nvmlDeviceGetName"](handle)
    text = name.decode() if isinstance(name, bytes) else str(name)
    return Counter(f"{text} ({number})", lambda: library["nvmlDeviceGetTotalEnergyConsumption"](handle) / 1e3)  # of mJ


def _zones(root: Path) -> list[tuple[str, Path]]:
    """Names and folders of what may be added up, in the order of their numbers.

    Domains inside a package stand in its folder, and on most systems beside it, too: each is taken once.
    """
    zones: dict[str, tuple[str, Path]] = {}
    tops = sorted(path for path in root.iterdir() if _ZONE.fullmatch(path.name))
    for path in (*tops, *(inner for top in tops for inner in sorted(top.iterdir()) if _ZONE.fullmatch(inner.name))):
        name = _name(path)
        if path.name in zones or not _COUNTED.fullmatch(name):
            continue
        owner = ":".join(path.name.split(":")[:2])
        of = f" of {zones[owner][0]}" if owner in zones and owner != path.name else ""
        zones[path.name] = f"{name}{of}", path
    return list(zones.values())


def _name(zone: Path) -> str:
    """What a zone calls itself; "" where it says nothing."""
    path = zone / "name"
    return path.read_text().strip() if path.is_file() else ""


def _joules(path: Path) -> float:
    """A file in microjoules."""
    return int(path.read_text()) / 1e6
