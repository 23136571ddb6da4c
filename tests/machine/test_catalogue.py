"""The catalogue: what people type, what is refused, and a person's own devices."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spicerack.cli import _output, cli
from spicerack.errors import UsageError
from spicerack.machine import catalogue


@pytest.fixture(autouse=True)
def _nobody_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))


@pytest.mark.parametrize(
    ("typed", "names"),
    [
        ("2x3090", ["RTX 3090"] * 2), ("rtx 3090 x2", ["RTX 3090"] * 2), ("RTX3090-Ti", ["RTX 3090 Ti"]),
        ("nvidia geforce rtx 4090", ["RTX 4090"]), ("3090 + 4090", ["RTX 3090", "RTX 4090"]),
        ("m2-ultra", ["Apple M2 Ultra"]), ("m3 max 40", ["Apple M3 Max (40 GPU cores)"]),
        ("48GB m4 pro", ["Apple M4 Pro, 48 GB"]), ("64gb mac", ["Mac, 64 GB"]), ("iPhone 16 Pro", ["Apple A18 Pro"]),
        ("pixel 9", ["Google Tensor G4"]), ("rpi5", ["Raspberry Pi 5"]), ("24 GB", ["24 GB"]),
        ("Ryzen AI Max+ 395", ["Ryzen AI Max+ 395 (Strix Halo)"]),
        ("EPYC 9004, 12 x DDR5-4800", ["EPYC 9004, 12 x DDR5-4800"]), ("8x h200", ["H200 SXM"] * 8),
    ],
)  # fmt: skip
def test_what_people_type(typed: str, names: list[str]) -> None:
    assert [device.name for device in catalogue.find(typed)] == names


@pytest.mark.parametrize("typed", ["", "x", "2x", "0GB", "RTX 9999", "99x3090", "0x3090", "+", "3090 +", "%s", "h100"])
def test_what_is_refused(typed: str) -> None:
    with pytest.raises(UsageError) as refused:
        catalogue.find(typed)
    assert refused.value.hint


def test_every_device_is_found_by_its_own_name_and_says_where_it_is_from() -> None:
    names = [device.name for device in catalogue.built_in()]
    assert len(names) == len(set(names)) == 98
    for device in catalogue.built_in():
        assert catalogue.find(device.name) == (device,)
        assert device.source and 0 < device.usable_gib <= device.memory_gib
        for alias in device.aliases:
            assert catalogue.find(alias) == (device,)


def test_a_size_of_memory_follows_the_catalogue_s_rules() -> None:
    small, large = catalogue.find("36GB m4 pro")[0], catalogue.find("48GB m4 pro")[0]
    assert (small.usable_gib, large.usable_gib) == pytest.approx((24.12, 36))
    assert small.bandwidth_gb_s == large.bandwidth_gb_s == 273


def test_own_devices_come_first_and_are_written_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"name": "Gold Card", "kind": "gpu", "memory_gib": 40, "bandwidth_gb_s": 1500, "arch": "sm90"}
    other = {"name": "RTX 3090", "memory_gib": 48}
    file = tmp_path / "mine.json"
    file.write_text(json.dumps([row, other]))
    assert _output.run(cli, ["devices", "--add", str(file)]) == 0
    assert "Gold Card" in capsys.readouterr().out
    assert catalogue.find("gold")[0].usable_gib == 40
    assert catalogue.find("rtx 3090")[0].memory_gib == 48 and len(catalogue.everything()) == 99
    file.write_text(json.dumps({**row, "memory_gib": 41}))
    assert _output.run(cli, ["devices", "--add", str(file)]) == 0
    assert catalogue.find("gold")[0].memory_gib == 41 and len(catalogue.own()) == 2
    assert [path.name for path in catalogue.own_file().parent.iterdir()] == ["devices.json"]
    shown = capsys.readouterr()
    assert _output.run(cli, ["devices", "gold", "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)["devices"]
    file.write_text(json.dumps(told))  # what is printed can be added
    assert _output.run(cli, ["devices", "--add", str(file)]) == 0, shown


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"memory_gib": 4}, "name"), ({"name": "A"}, "memory_gib"), ({"name": "A", "memory_gib": "4"}, "memory_gib"),
        ({"name": "A", "memory_gib": -1}, "memory_gib"), ({"name": "A", "memory_gib": True}, "memory_gib"),
        ({"name": "A", "memory_gib": 4, "kind": "mug"}, "mug"), ({"name": "A", "memory_gib": 4, "ram": 1}, "ram"),
        ({"name": "A\x1b[2J", "memory_gib": 4}, "name"), ({"name": "A", "memory_gib": 4, "link": 3}, "link"),
        ({"name": "A", "memory_gib": 4, "uncertain": "tdp"}, "uncertain"),
        ({"name": "A", "memory_gib": 4, "usable_gib": 4.5}, "usable_gib 4.5 of memory_gib 4"),
        ({"name": "A", "memory_gib": 1e-9}, "memory_gib"),
        ({"name": "A", "memory_gib": 4, "source": "\x1b[31m"}, "source"),
        ({"name": "A", "memory_gib": 4, "tdp_w": 1e-300}, "tdp_w"),
        ({"name": "A", "memory_gib": 4, "uncertain": ["\x1b[2J"]}, "uncertain"),
        ([{"name": "A", "memory_gib": 4}, {"name": "a", "memory_gib": 8}], "two devices"),
        ([], "no devices"), (3, "no devices"),
    ],
)  # fmt: skip
def test_own_devices_that_make_no_sense(row: object, said: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(row))
    with pytest.raises(UsageError, match=said):
        catalogue.add(file)
    assert not catalogue.own_file().exists()


@pytest.mark.parametrize("name", ["K", "8gb", "2x E", "\u6211\u7684\u663e\u5361", "[red]F[/red]", "3090"])
def test_own_devices_are_found_by_their_own_names(name: str, tmp_path: Path) -> None:
    """Whatever they are: of one letter, in other alphabets, a size, or what others are called, too."""
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"name": name, "memory_gib": 4}))
    catalogue.add(file)
    assert [device.name for device in catalogue.find(name)] == [name] == [d.name for d in catalogue.find(f" {name} ")]
    assert len(catalogue.find(f"2x {name}")) == 2
    other = {"name": "Mine", "memory_gib": 4, "aliases": ["rtx 4090"]}
    file.write_text(json.dumps(other))
    catalogue.add(file)
    assert catalogue.find("RTX 4090")[0].name == "Mine"


def test_the_list_fits_80_columns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert _output.run(cli, ["devices"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 100 and all(len(line) <= 80 for line in lines)
