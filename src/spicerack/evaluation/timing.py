"""What a benchmark says: speeds with their spread, and bytes, of each model that took turns; as JSON, too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from spicerack.evaluation.opening import Opening
from spicerack.evaluation.turns import DecoderTurn, EncoderTurn


@dataclass(frozen=True, slots=True)
class Speed:
    """Items (tokens, sentences) per second over the rounds: their median, the least and the most."""

    median: float
    least: float
    most: float


@dataclass(frozen=True, slots=True)
class Timing:
    """One model, timed.

    name            original, quantized ...
    compute         the kernel and type that it ran with
    speeds          figure -> speed: prefill_tokens_per_s and decode_tokens_per_s, or items_per_s, in this order
    bytes_on_disk   of its weight files
    resident_bytes  what its parameters and buffers hold in memory after a run
    cache_bytes     keys and values at the end of a run; None of an encoder
    opening         how long it took to open
    """

    name: str
    compute: str
    speeds: Mapping[str, Speed]
    bytes_on_disk: int
    resident_bytes: int
    cache_bytes: int | None
    opening: Opening

    def as_dict(self) -> dict[str, Any]:
        """A row of the command line's contract: each figure's median, with `_min` and `_max` beside it."""
        speeds: dict[str, float] = {}
        for figure, speed in self.speeds.items():
            speeds |= {figure: speed.median, f"{figure}_min": speed.least, f"{figure}_max": speed.most}
        return {
            "name": self.name,
            "compute": self.compute,
            **speeds,
            "bytes_on_disk": self.bytes_on_disk,
            "resident_bytes": self.resident_bytes,
            **self.opening.as_dict(),
            **({} if self.cache_bytes is None else {"cache_bytes": self.cache_bytes}),
        }


@dataclass(frozen=True, slots=True)
class Benchmark:
    """What was timed, and how.

    models    the original, the quantized one, and the original in float32 if that was asked for
    work      what a turn was
    cache     bits of the quantized model's cache, None where it was as computed
    repeats   rounds that count;  threads: of the CPU that were used;  device: where all models ran
    """

    models: tuple[Timing, ...]
    work: DecoderTurn | EncoderTurn
    cache: int | None
    repeats: int
    threads: int
    device: str

    @property
    def original(self) -> Timing:
        """The model that the other was made from, in its own type."""
        return self.models[0]

    @property
    def quantized(self) -> Timing:
        """The folder that was asked about."""
        return self.models[1]

    @property
    def figure(self) -> str:
        """The figure that tells most: a decoder's new tokens per second, an encoder's sentences."""
        return list(self.original.speeds)[-1]

    @property
    def speedup(self) -> float:
        """How many times as fast the quantized model is in `figure`, by the medians; below 1 it is slower."""
        return self._ratio(self.figure)

    def as_dict(self) -> dict[str, Any]:
        """JSON, under the names of the command line's contract."""
        figures = list(self.original.speeds)
        return {
            "rows": [timing.as_dict() for timing in self.models],
            "speedup": self.speedup,
            **({"speedup_prefill": self._ratio(figures[0])} if isinstance(self.work, DecoderTurn) else {}),
            **asdict(self.work),
            **({"cache": self.cache} if self.cache is not None else {}),
            "repeats": self.repeats,
            "threads": self.threads,
            "device": self.device,
        }

    def _ratio(self, figure: str) -> float:
        """How many times as fast the quantized model is, by the medians."""
        return self.quantized.speeds[figure].median / self.original.speeds[figure].median
