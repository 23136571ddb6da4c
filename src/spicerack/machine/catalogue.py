"""Devices that models run on, as data: memory, bandwidth, peaks, and where each figure is from.

The catalogue is `catalogue.json` beside this file; a person's own devices are rows of the same shape in a file of
theirs (`own_file`), and come first. Peaks are dense, those of NVIDIA's tensor cores with float32 accumulation. What is
not confirmed is named in `uncertain`, and shown with "about".

People type `2x3090`, `rtx 3090 x2`, `m3-max`, `64GB m4 max`, `iPhone 16 Pro`, `8gb`: words in any order, spaces and
hyphens or none. A name that fits several rows equally well is refused with their names, because memory is what they
differ in.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from spicerack.errors import UsageError, listed

GIB = 1 << 30
Kind = Literal["gpu", "soc", "cpu", "phone", "watch", "memory"]
"""gpu has memory of its own; soc shares it with its processor; memory is a size and nothing else"""
_KINDS = ("gpu", "soc", "cpu", "phone", "watch", "memory")
_MOST = 64
"""Devices of a machine: more is a slip of the keyboard."""
_LEAST = 0.001
"""Of a figure: a mebibyte of memory, a megabyte a second, a milliwatt."""
_BRANDS = frozenset({"nvidia", "geforce", "rtx", "gtx", "quadro", "amd", "radeon", "rx", "intel", "apple", "google"})
"""Words that may be left out, or be too many."""
_REPORTED = 0.982
"""Of a card's nominal memory, what its driver reports as all: a 3090 of 24 GiB says 23.57."""


@dataclass(frozen=True, slots=True)
class Device:
    """One device. Unknown figures are None.

    name              as the catalogue has it
    kind              see `Kind`
    memory_gib        all of it, as sold
    usable_gib        what a model may have: less context and driver of a card, the system of others
    bandwidth_gb_s    10^9 bytes of memory read in a second, at most
    fp32_tflops, fp16_tflops, int8_tops, fp8_tflops, fp4_tflops   10^12 operations a second, at most
    tdp_w             watts under load
    link              to other devices
    arch              sm86, gfx1100, metal, avx2 ...
    uncertain         fields that are not confirmed
    note, source      for people
    aliases           products that it is in
    """

    name: str
    kind: Kind
    memory_gib: float
    usable_gib: float
    bandwidth_gb_s: float | None = None
    fp32_tflops: float | None = None
    fp16_tflops: float | None = None
    int8_tops: float | None = None
    fp8_tflops: float | None = None
    fp4_tflops: float | None = None
    tdp_w: float | None = None
    link: str = ""
    arch: str = ""
    uncertain: tuple[str, ...] = ()
    note: str = ""
    source: str = ""
    aliases: tuple[str, ...] = ()

    @property
    def usable(self) -> int:
        """Bytes that a model may have."""
        return int(self.usable_gib * GIB)

    @property
    def reported(self) -> int:
        """Bytes that the driver of a card reports as all of its memory; of others what is usable."""
        return int(self.memory_gib * _REPORTED * GIB) if self.kind == "gpu" else self.usable

    @property
    def apple(self) -> bool:
        """Whether it computes with Metal."""
        return self.arch == "metal"

    @property
    def shares_memory(self) -> bool:
        """Whether the processor's memory is the same: a table that stays there costs it, too."""
        return self.kind != "gpu"


def everything() -> tuple[Device, ...]:
    """All devices, the person's own first; one of theirs takes the place of one of the same name."""
    mine = own()
    names = {device.name.lower() for device in mine}
    return (*mine, *(device for device in built_in() if device.name.lower() not in names))


@lru_cache(maxsize=1)
def built_in() -> tuple[Device, ...]:
    """The catalogue that comes with the package."""
    rows = json.loads(Path(__file__).with_name("catalogue.json").read_text(encoding="utf-8"))
    return tuple(_device(row, "catalogue.json") for row in rows)


def own_file() -> Path:
    """Where a person's own devices are kept: under XDG_CONFIG_HOME, or ~/.config."""
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "spicerack" / "devices.json"


def own() -> tuple[Device, ...]:
    """A person's own devices; none without a file. Raises UsageError for one that cannot be read."""
    path = own_file()
    return _read(path) if path.is_file() else ()


def add(source: Path) -> tuple[Device, ...]:
    """Add the devices of a JSON file, one object or a list of them, to the person's own -> those that were added.

    The file of theirs is replaced in one step, so that it is whole at any time; a device of the same name is replaced.
    Raises UsageError for a file that cannot be read, and for rows that make no sense, by name and field.
    """
    added = _read(source)
    names = {device.name.lower() for device in added}
    rows = [*added, *(device for device in own() if device.name.lower() not in names)]
    path = own_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
            json.dump([_row(device) for device in rows], file, indent=1, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())
        Path(file.name).replace(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error}", "set XDG_CONFIG_HOME to a folder of yours") from error
    return added


def find(text: str, among: tuple[Device, ...] | None = None) -> tuple[Device, ...]:
    """What a person means by `text`: a device, several of one kind (`2x3090`), or several kinds (`3090 + 4090`).

    among: where it is looked for; None stands for `everything`.
    Raises UsageError with the nearest names for what is not in the catalogue, and with all names where several fit.
    """
    devices = everything() if among is None else among
    dangling = re.match(r"\s*\+", text) or re.search(r"\s\+\s*$", text)
    whole = _called(text, devices) or ([] if dangling else _matching(text, devices))
    if not whole and "+" in text:
        return tuple(device for part in text.split("+") for device in find(part.strip(), among))
    count, name = _count(text)
    matches = whole or _matching(name, devices)
    if matches and not whole and not 1 <= count <= _MOST:
        raise UsageError(f"{text!r}: {count} devices", f"give 1 to {_MOST}")
    if len(matches) == 1:
        return (matches[0],) * (1 if whole else count)
    if matches:
        names = listed([device.name for device in matches], 6)
        raise UsageError(f"{name!r} fits several devices: {names}", "give more of the name")
    raise UsageError(f"no device {name!r} in the catalogue", _nearest(name, devices))


def _count(text: str) -> tuple[int, str]:
    """`2x3090`, `2 x 3090`, `3090 x2` -> 2 and the name."""
    before = re.fullmatch(r"\s*(\d{1,3})\s*[x\u00d7*]\s*(\S.*)", text, re.IGNORECASE)
    if before:
        return int(before[1]), before[2]
    behind = re.fullmatch(r"(.*\S)\s*[x\u00d7*]\s*(\d{1,2})\s*", text, re.IGNORECASE)
    return (int(behind[2]), behind[1]) if behind else (1, text)


def _matching(text: str, devices: Iterable[Device]) -> list[Device]:
    """The devices that fit best; several where they fit equally well. One that is called just so fits best of all."""
    if same := _called(text, devices):
        return same
    if bare := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:gb|gib|g)\s*", text, re.IGNORECASE):
        size = float(bare[1])
        return [Device(f"{bare[1]} GB", "memory", size, size, source="a size, and nothing else")] if size else []
    found = _best(_words(text), devices)
    if found:
        return found
    sized = re.search(r"\b(\d{1,4})\s*(?:gb|gib)\b", text, re.IGNORECASE)  # of what is sold with several sizes
    if sized is None:
        return []
    rest = text[: sized.start()] + text[sized.end() :]
    if _words(rest) == {"mac"}:
        mac = Device("Mac", "soc", 0, 0, arch="metal", source="a size, and Apple's share of it")
        return [_resized(mac, int(sized[1]))]
    shared = [device for device in _best(_words(rest), devices) if device.kind in ("soc", "cpu", "phone")]
    return [_resized(device, int(sized[1])) for device in shared] if int(sized[1]) else []


def _called(text: str, devices: Iterable[Device]) -> list[Device]:
    """The first that is called just so; none where none is."""
    name = text.strip().casefold()
    same = (one for one in devices if name in (other.casefold() for other in (one.name, *one.aliases)))
    return list(itertools.islice(same, 1))


def _best(words: frozenset[str], devices: Iterable[Device]) -> list[Device]:
    """Devices with all of these words in a name of theirs, and the fewest others."""
    if len("".join(words)) < 2:  # a letter is in many names
        return []
    scored = []
    for device in devices:
        names = (_words(name) for name in (device.name, *device.aliases))
        others = [len(name - words - _BRANDS) for name in names if words - _BRANDS <= name and words - _BRANDS]
        if others:
            scored.append((min(others), device))
    least = min((score for score, _ in scored), default=0)
    return [device for score, device in scored if score == least]


def _words(text: str) -> frozenset[str]:
    """Words and numbers, apart: "RTX3090-Ti" is rtx, 3090, ti; a letter that stands before a number stays with it."""
    joined = re.findall(r"[a-z]+|\d+(?:\.\d+)?", text.lower())
    words, i = [], 0
    while i < len(joined):
        short = len(joined[i]) == 1 and joined[i].isalpha() and i + 1 < len(joined)
        words.append(joined[i] + joined[i + 1] if short else joined[i])
        i += 2 if short else 1
    return frozenset(words)


def _resized(device: Device, gib: int) -> Device:
    """The same with another size of memory, by the rules that the catalogue goes by."""
    if device.apple:
        usable = gib * (0.67 if gib <= 36 else 0.75)  # what Metal lets a GPU have
    elif device.kind == "phone":
        usable = gib / 2
    else:
        usable = max(gib - max(2.0, min(gib / 4, device.memory_gib - device.usable_gib)), gib / 4)
    return dataclasses.replace(device, name=f"{device.name}, {gib} GB", memory_gib=gib, usable_gib=usable)


def _nearest(name: str, devices: Iterable[Device]) -> str:
    """The hint for a name that is not there: those that look like it."""
    by_name = {text.lower(): device.name for device in devices for text in (device.name, *device.aliases)}
    near = difflib.get_close_matches(name.lower(), by_name, n=4, cutoff=0.4)
    words = _words(name)
    near += [text for text in by_name if words & _words(text) - _BRANDS][:4]
    names = list(dict.fromkeys(by_name[text] for text in near))[:4]
    meant = f"did you mean {', '.join(names)}? " if names else ""
    return f"{meant}spicerack devices lists all; --add takes your own; a bare size such as 24GB plans memory alone"


def _read(path: Path) -> tuple[Device, ...]:
    """The devices of a person's file. Raises UsageError."""
    try:
        text = path.read_text(encoding="utf-8")
        rows = json.loads(text)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as JSON: {error}", "it is an object, or a list of them") from error
    rows = rows if isinstance(rows, list) else [rows]
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise UsageError(f"{path} holds no devices", "it is an object with name, kind, memory_gib, or a list of them")
    devices = tuple(_device(row, str(path)) for row in rows)
    names = [device.name.lower() for device in devices]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"{path} has two devices that are called {twice[0]!r}", "give them names of their own")
    return devices


def _device(row: Mapping[str, Any], where: str) -> Device:
    """A row of JSON as a Device. Raises UsageError, naming the row and the field."""
    name = row.get("name")
    if not isinstance(name, str) or not name.strip() or not name.isprintable() or len(name) > 100:
        raise UsageError(f"{where}: a device has the name {name!r}", "give it one, of at most 100 letters")
    known = {field.name: field for field in dataclasses.fields(Device)}
    if unknown := sorted(row.keys() - known.keys()):
        raise UsageError(f"{where}: {name} has the unknown field {unknown[0]!r}", f"fields are {', '.join(known)}")
    values = dict(row)
    values.setdefault("kind", "gpu")
    if values["kind"] not in _KINDS:
        raise UsageError(f"{where}: {name} is of the kind {values['kind']!r}", f"one of {', '.join(_KINDS)}")
    values.setdefault("usable_gib", values.get("memory_gib"))
    for field in ("memory_gib", "usable_gib", "bandwidth_gb_s", "fp32_tflops", "fp16_tflops", "int8_tops",
                  "fp8_tflops", "fp4_tflops", "tdp_w"):  # fmt: skip
        value = values.get(field)
        optional = field not in ("memory_gib", "usable_gib")
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and _LEAST <= value < 1e9
        if not number and not (optional and value is None):
            raise UsageError(f"{where}: {name} has {field} {value!r}", f"it is a number from {_LEAST:g} on")
    if values["usable_gib"] > values["memory_gib"]:
        raise UsageError(
            f"{where}: {name} has usable_gib {values['usable_gib']!r} of memory_gib {values['memory_gib']!r}",
            "a model cannot have more than all",
        )
    for field in ("uncertain", "aliases"):
        texts = values.get(field, [])
        if not isinstance(texts, list) or not all(map(_is_text, texts)):
            raise UsageError(f"{where}: {name} has {field} {texts!r}", "it is a list of texts, in one line each")
        values[field] = tuple(texts)
    if wrong := [field for field in ("link", "arch", "note", "source") if not _is_text(values.get(field, ""))]:
        raise UsageError(f"{where}: {name} has {wrong[0]} {values[wrong[0]]!r}", "it is a text, in one line")
    return Device(**values)


def _is_text(value: object) -> bool:
    """Whether a terminal can be given it."""
    return isinstance(value, str) and value.isprintable()


def _row(device: Device) -> dict[str, Any]:
    """The inverse of `_device`."""
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(device).items()
    }
