"""`sensitivity.json`: what is written is read again, and what a stranger put into it is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spicerack.errors import CheckpointError
from spicerack.planning import sensitivity
from spicerack.planning.sensitivity import Budget, Option, Point, Round, Sensitivity, Unit

WHOLE = Sensitivity(
    "kl", {"text": "ab"}, 2048,
    (
        Unit("a.q+k", ("a.q.weight", "a.k.weight"), 512,
             {"w2": Option(128, 1024, 0.5, 0.6), "w8": Option(512, 4096, 0, 0)}, "w2"),
        Unit("b", ("b.weight",), 64, {"w8": Option(64, 512, 1e-9, 1e-9)}, "w8"),
    ),
    Budget("bits", 3.5),
    (Point(2200, 2.2, 0.6), Point(2600, 8.0, 1e-9, 2e-9, (1e-9, 3e-9))),
    (Round(2200, 2.2, 0.6, 0.61, (0.5, 0.7), 99, (0.1, -0.1, 0.2)), Round(2200, 2.2, 0.6, 0.61, (0.5, 0.7), 99)),
)  # fmt: skip


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert sensitivity.read(tmp_path) is None
    WHOLE.write(tmp_path)
    assert sensitivity.read(tmp_path) == WHOLE
    assert WHOLE.weights == 576


def changed(path: list[Any], value: Any) -> Callable[[Any], None]:
    def change(record: Any) -> None:
        for key in path[:-1]:
            record = record[key]
        record[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["metric"], "joy"), (["identity"], []), (["fixed_bytes"], -1), (["units"], {}), (["units", 0, "tensors"], "x"),
        (["units", 0, "weights"], True), (["units", 0, "schemes"], {}), (["units", 0, "chosen"], "w3"),
        (["units", 0, "name"], "x" * 2000), (["units", 0, "schemes", "w2", "loss"], float("nan")),
        (["units", 0, "schemes", "w2", "loss"], -1e-3), (["units", 0, "schemes", "w2", "nbytes"], 1e30),
        (["units", 0, "schemes", "w2"], None), (["budget", "kind"], "money"), (["budget", "value"], float("inf")),
        (["curve", 0], 7), (["curve", 0, "nbytes"], 1 << 70), (["curve", 1, "interval"], [1]),
        (["rounds", 0, "tokens"], 0.5), (["rounds", 0, "interval"], [0, "1"]), (["rounds", 0, "rise"], [0, 1]),
    ],
)  # fmt: skip
def test_a_strangers_file_is_refused(tmp_path: Path, path: list[Any], value: Any) -> None:
    record = WHOLE.as_dict()
    text = json.dumps(record)
    again = json.loads(text)
    changed(path, value)(again)
    (tmp_path / "sensitivity.json").write_text(json.dumps(again))
    with pytest.raises(CheckpointError, match=r"sensitivity\.json"):
        sensitivity.read(tmp_path)


def test_what_is_no_json_is_refused_and_another_version_is_none(tmp_path: Path) -> None:
    (tmp_path / "sensitivity.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError):
        sensitivity.read(tmp_path)
    (tmp_path / "sensitivity.json").write_text(json.dumps({"version": 0}))
    assert sensitivity.read(tmp_path) is None
