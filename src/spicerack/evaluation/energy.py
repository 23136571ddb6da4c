"""Joules per token of a folder as it ships, by the meters of this machine.

How it works. The model is loaded; then the machine is left alone for some seconds, and its idle power read; then turns
follow one another for at least half a minute: a decoder reads one token and writes 64, an encoder embeds a batch. What
the meters counted less idle power times that time, over the tokens, is the figure; with idle stands beside it.

What is given up. Meters count the machine and not the process: whatever else runs is counted, too, and what ran while
it idled is subtracted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spicerack.arguments import at_least, check_fields, checked
from spicerack.errors import UsageError
from spicerack.evaluation.bench import BATCH, DECODE, LENGTH
from spicerack.evaluation.evaluate import compute
from spicerack.evaluation.turns import DecoderTurn, EncoderTurn
from spicerack.kernels import kernel
from spicerack.machine.energy import Counter, Meter
from spicerack.models.inputs import limits
from spicerack.models.kind import kind_of
from spicerack.models.opening import open_stored
from spicerack.runtime.load import load
from spicerack.storage.files import locate

Progress = Callable[[str, float], None]
"""Called with what is being done and the share of it that is done, 0 to 1."""
IDLE = 10.0
"""Seconds that idle power is measured for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnergyOptions:
    """How energy is measured.

    seconds  that turns go on for at least: meters are slow, and half a minute makes their steps small
    device   where the model runs
    engine   that it computes with, as in `load`; None: the fastest
    trust_remote_code   whether code that came with the model may run
    """

    seconds: float = 30.0
    device: str = "cpu"
    engine: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        at_least(0, seconds=self.seconds)


_DEFAULTS = EnergyOptions()


@dataclass(frozen=True, slots=True)
class Measured:
    """What the meters counted.

    compute       the kernel and type that the model ran with
    tokens        read and written, in so many `turns`
    seconds       that they took;  idle_seconds: that idle power was measured for
    joules        of each meter in that time, idle included
    idle_watts    of each meter before
    """

    compute: str
    tokens: int
    turns: int
    seconds: float
    idle_seconds: float
    joules: Mapping[str, float]
    idle_watts: Mapping[str, float]

    @property
    def joules_per_token(self) -> float:
        """Of all meters, idle subtracted."""
        return (sum(self.joules.values()) - sum(self.idle_watts.values()) * self.seconds) / self.tokens

    @property
    def joules_per_token_with_idle(self) -> float:
        """Of all meters, as they counted."""
        return sum(self.joules.values()) / self.tokens

    def as_dict(self) -> dict[str, Any]:
        """JSON, under the names of the command line's contract."""
        return {
            "how": "measured",
            "joules_per_token": self.joules_per_token,
            "joules_per_token_with_idle": self.joules_per_token_with_idle,
            "tokens_per_s": self.tokens / self.seconds,
            **asdict(self),
        }


@checked
def measure(
    folder: str | Path,
    meters: Sequence[Counter],
    *,
    options: EnergyOptions = _DEFAULTS,
    progress: Progress | None = None,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.perf_counter,
) -> Measured:
    """Load a folder, let the machine idle, let the model work, and read the meters.

    folder         or hub id;  meters: at least one
    options        for how long, and where
    progress       called with what is being done and the share of it
    sleep, clock   of the system, which tests replace

    Raises CheckpointError, LoadError, and UsageError, for an engine that is not there, too, and where idling took more.
    """
    out = locate(folder)
    kind = kind_of(open_stored(out).config, out)
    kernel.check_engine(options.engine, options.device)
    report = progress or (lambda _doing, _share: None)
    report("loading", 0.0)
    model = load(out, device=options.device, engine=options.engine, trust_remote_code=options.trust_remote_code)
    positions = limits(model, model.config).positions
    work: DecoderTurn | EncoderTurn
    if kind == "decoder":
        work = DecoderTurn(1, min(DECODE, (positions or DECODE + 1) - 1))
        count = work.prefill + work.decode
    else:
        work = EncoderTurn(BATCH, min(LENGTH, positions or LENGTH))
        count = work.batch * work.length
    work.run(model)  # warms up

    report("idling", 0.0)
    begin, meter = clock(), Meter(meters)
    sleep(IDLE)
    idled = clock() - begin
    idle = {name: joules / idled for name, joules in meter.sample().items()}

    begin, meter, turns, spent = clock(), Meter(meters), 0, 0.0
    while not turns or spent < options.seconds:
        work.run(model)
        turns += 1
        counted, spent = meter.sample(), clock() - begin
        report("measuring", min(spent / max(options.seconds, spent), 1.0))
    found = Measured(compute(model), turns * count, turns, spent, idled, counted, idle)
    if found.joules_per_token <= 0:
        raise UsageError(
            f"the machine took {sum(idle.values()):.3g} W while the model was idle, and no more while it worked",
            "other programs ran then: measure on a quiet machine, or with more --seconds",
        )
    return found
