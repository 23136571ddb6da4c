"""`sensitivity.json`: what each part of a model loses in each scheme, and what a run with a budget made of it.

It lies in the output folder, where the next run with another budget reads it, and whoever draws the run. Losses are
nats of KL per token of a language model, and 1 - cosine of embeddings of an encoder; they add up over units.

    {
      "version": 1, "metric": "kl", "identity": {...}, "fixed_bytes": 2100000,
      "units": [{"name": "model.layers.0.mlp.gate_proj+up_proj", "tensors": ["..."], "weights": 393216,
                 "schemes": {"w4g128": {"nbytes": 202752, "bits": 1622016, "estimate": 0.0021, "loss": 0.0024}},
                 "chosen": "w4g128"}],
      "budget": {"kind": "bits", "value": 3.5},
      "curve": [{"nbytes": 3450000, "bits": 3.25, "predicted": 0.031}, ...],
      "rounds": [{"nbytes": 3610112, "bits": 3.498, "predicted": 0.021, "measured": 0.0205,
                  "interval": [0.0191, 0.0219], "rise": [0.019, 0.016, 0.022], "tokens": 16352}]
    }

A file may be a stranger's: it is read with a bound on its size, every number is looked at, and what does not fit
together is refused by name.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from spicerack.errors import CheckpointError
from spicerack.storage.durable import json_bytes, write_atomically
from spicerack.storage.files import SENSITIVITY, read_json

VERSION = 1
"""Of the file's shape and of how losses are estimated: another one is measured again."""
Metric = Literal["kl", "cosine"]
"""Nats of KL per token, or 1 - cosine of a sentence's embedding."""
Kind = Literal["size", "bits", "max_kl", "max_loss"]
_MAX_BYTES = 64 << 20
"""Of a file that is read: a thousand units in twenty schemes have 3 MB of it."""
_LONGEST = 1000
"""Characters of a name that is read."""


@dataclass(frozen=True, slots=True)
class Option:
    """A unit in one scheme.

    nbytes    of all that its tensors become, headers left out
    bits      of its weights, scales and zero points counted, padding of words left out
    estimate  loss by the Fisher pass
    loss      the same, corrected by what was measured around the mix; the estimate where nothing was
    """

    nbytes: int
    bits: int
    estimate: float
    loss: float


@dataclass(frozen=True, slots=True)
class Unit:
    """Tensors that have one scheme.

    name     for people: the first of them, and the last parts of the others' names
    tensors  their names in the checkpoint
    weights  numbers in them
    schemes  name -> what the unit is and loses in it, those of the fewest bytes first
    chosen   name of the scheme that the run took; "" before it did
    """

    name: str
    tensors: tuple[str, ...]
    weights: int
    schemes: Mapping[str, Option]
    chosen: str = ""

    @property
    def loss(self) -> float:
        """In the scheme that the run took; before it did, in that of the fewest bytes."""
        return (self.schemes[self.chosen] if self.chosen else next(iter(self.schemes.values()))).loss


@dataclass(frozen=True, slots=True)
class Budget:
    """What was asked for.

    kind    size: bytes of the files of weights; bits: of a quantized weight; max_kl: nats per token; max_loss: a share,
            of perplexity more (language models) or of 1 - cosine (encoders)
    value   in that unit
    """

    kind: Kind
    value: float


@dataclass(frozen=True, slots=True)
class Point:
    """The best mix of so many bytes.

    nbytes     of all tensors of the folder
    bits       of a quantized weight
    predicted  its loss
    measured   its loss on held-out text; None where it was not written
    interval   95 % of it; None where it was not written
    """

    nbytes: int
    bits: float
    predicted: float
    measured: float | None = None
    interval: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Round:
    """A mix that was written and measured.

    nbytes, bits, predicted   as in `Point`, as they were before it was measured
    measured, interval        loss on held-out text, and 95 % of it
    tokens                    of that text
    rise                      of perplexity, as a share, and 95 % of it; None of encoders
    """

    nbytes: int
    bits: float
    predicted: float
    measured: float
    interval: tuple[float, float]
    tokens: int
    rise: tuple[float, float, float] | None = None


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """The whole file.

    metric       of all losses in it
    identity     facts in which a run must agree that takes the estimates over: model, text, schemes, method
    fixed_bytes  of what has no choice: floats, and tensors that a rule decided about
    units        what has one
    budget       of the run; None before one was solved for
    curve        what each further byte buys, the fewest first
    rounds       in order; the last is the folder's
    """

    metric: Metric
    identity: Mapping[str, Any]
    fixed_bytes: int
    units: tuple[Unit, ...]
    budget: Budget | None = None
    curve: tuple[Point, ...] = ()
    rounds: tuple[Round, ...] = ()

    @property
    def weights(self) -> int:
        """Numbers that a scheme is chosen for."""
        return sum(unit.weights for unit in self.units)

    def as_dict(self) -> dict[str, Any]:
        """As the file holds it."""
        fields = dataclasses.asdict(self)
        fields["curve"] = [{key: v for key, v in point.items() if v is not None} for point in fields["curve"]]
        return {"version": VERSION, **fields}

    def write(self, folder: Path) -> None:
        """Put the file into a folder, in place of one that is there."""
        write_atomically(folder / SENSITIVITY, json_bytes(self.as_dict()))


def read(folder: Path) -> Sensitivity | None:
    """The file of a folder; None if it has none, or one of another version.

    Raises CheckpointError for what is no such file: too large, no JSON, a key that is missing, a number that is none.
    """
    path = folder / SENSITIVITY
    if not path.is_file():
        return None
    record = read_json(path, _MAX_BYTES)
    if record.get("version") != VERSION:
        return None
    try:
        return _parsed(record)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is not what spicerack wrote: {error!r}", "remove it") from error


def _parsed(record: Mapping[str, Any]) -> Sensitivity:
    """Raises KeyError, TypeError, ValueError for anything that is not as `Sensitivity.as_dict` has it."""
    metric, budget, identity = record["metric"], record["budget"], record["identity"]
    if metric not in get_args(Metric):
        raise ValueError(f"metric is {metric!r}")
    if not isinstance(identity, Mapping):
        raise TypeError("identity is no object")
    return Sensitivity(
        metric=metric,
        identity=identity,
        fixed_bytes=_count(record["fixed_bytes"]),
        units=tuple(map(_unit, _list(record["units"]))),
        budget=None if budget is None else _budget(budget),
        curve=tuple(map(_point, _list(record["curve"]))),
        rounds=tuple(map(_round, _list(record["rounds"]))),
    )


def _unit(record: Mapping[str, Any]) -> Unit:
    schemes = {_name(name): _option(option) for name, option in record["schemes"].items()}
    chosen = str(record["chosen"])
    if not schemes or (chosen and chosen not in schemes):
        raise ValueError(f"unit {record['name']!r} is in {chosen!r}, of {len(schemes)} schemes")
    tensors = tuple(map(_name, _list(record["tensors"])))
    return Unit(_name(record["name"]), tensors, _count(record["weights"]), schemes, chosen)


def _option(record: Mapping[str, Any]) -> Option:
    return Option(
        _count(record["nbytes"]), _count(record["bits"]), _number(record["estimate"]), _number(record["loss"])
    )


def _budget(record: Mapping[str, Any]) -> Budget:
    if record["kind"] not in get_args(Kind):
        raise ValueError(f"budget is of kind {record['kind']!r}")
    return Budget(record["kind"], _number(record["value"]))


def _point(record: Mapping[str, Any]) -> Point:
    measured, interval = record.get("measured"), record.get("interval")
    return Point(
        _count(record["nbytes"]), _number(record["bits"]), _number(record["predicted"]),
        None if measured is None else _number(measured, least=-math.inf),
        None if interval is None else _interval(interval),
    )  # fmt: skip


def _round(record: Mapping[str, Any]) -> Round:
    return Round(
        _count(record["nbytes"]), _number(record["bits"]), _number(record["predicted"]),
        _number(record["measured"], least=-math.inf), _interval(record["interval"]), _count(record["tokens"]),
        None if record.get("rise") is None else _rise(record["rise"]),
    )  # fmt: skip


def _interval(value: Any) -> tuple[float, float]:
    lo, hi = (_number(end, least=-math.inf) for end in _list(value))
    return lo, hi


def _rise(value: Any) -> tuple[float, float, float]:
    mean, lo, hi = (_number(one, least=-math.inf) for one in _list(value))
    return mean, lo, hi


def _list(value: Any) -> Sequence[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{value!r:.40} is no list")
    return value


def _name(value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= _LONGEST:
        raise ValueError(f"{value!r:.40} is no name")
    return value


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 62:
        raise ValueError(f"{value!r:.40} is no number of bytes, weights or tokens")
    return value


def _number(value: Any, least: float = 0.0) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < least:
        raise ValueError(f"{value!r:.40} is no loss")
    return float(value)
