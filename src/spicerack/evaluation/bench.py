"""What a quantized folder gained: size on disk, bytes in memory, time to open and speed, beside the model it was made
from.

How it works. The models take turns (A B A B ...) in one process on the same inputs, so that a machine that slows down,
or another program, meets both; the first round warms up caches and is not counted. Medians and the whole spread are
reported. What a turn is stands in `turns.py`. Tokenizers are not timed.

First each is opened some times, alone (`opening.py`).

What is given up. All models are in memory at once, and the inputs are random tokens: a model whose speed depends on
what it reads (a mixture of experts) is timed as on noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from transformers import PreTrainedModel

from spicerack.arguments import at_least, check_fields, checked
from spicerack.errors import UsageError
from spicerack.evaluation.evaluate import compute
from spicerack.evaluation.folder import check_sides
from spicerack.evaluation.opening import Opening, open_in_turns
from spicerack.evaluation.timing import Benchmark, Speed, Timing
from spicerack.evaluation.turns import DecoderTurn, EncoderTurn, Sample, take_turns
from spicerack.kernels import kernel
from spicerack.machine import devices
from spicerack.models.config import architecture
from spicerack.models.inputs import limits
from spicerack.models.kind import Kind, kind_of
from spicerack.models.opening import open_stored
from spicerack.runtime.load import load
from spicerack.storage import files

Progress = Callable[[str, float], None]
"""Called with what is being done and the share of it that is done, 0 to 1."""

PREFILL, DECODE, REPEATS, BATCH, LENGTH = 512, 64, 5, 32, 64
"""Prompt tokens, new tokens, rounds; and for encoders sequences at once and tokens of each."""
_ORIGINAL, _QUANTIZED = "original", "quantized"


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """How two folders are timed.

    prefill  decoders: prompt tokens; None: 512, or what the model has room for beside the new ones
    decode   decoders: new tokens, one by one
    batch    encoders: sequences at once
    repeats  rounds of taking turns that count
    threads  of the CPU; None: as torch chooses
    device   where all models run
    float32  time the original in float32, too: bfloat16 is slow on many CPUs
    engine   of the quantized model, as in `load`; None: the fastest
    cache    bits of the quantized model's key-value cache, as in `load`; the original's stays as it is
    trust_remote_code   whether code that came with the model may run
    """

    prefill: int | None = None
    decode: int = DECODE
    batch: int = BATCH
    repeats: int = REPEATS
    threads: int | None = None
    device: str = "cpu"
    float32: bool = False
    engine: str | None = None
    cache: int | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        at_least(
            1, prefill=self.prefill, decode=self.decode, batch=self.batch, repeats=self.repeats, threads=self.threads
        )


_DEFAULTS = BenchOptions()


@checked
def bench(
    folder: str | Path,
    *,
    against: str | Path,
    options: BenchOptions = _DEFAULTS,
    progress: Progress | None = None,
) -> Benchmark:
    """Time `folder` and the model it was made from, in turns -> speeds, bytes and how they were measured.

    folder, against   folders or hub ids, of one kind of model
    options           what a turn is, how many of them, and where
    progress          called with what is being done and the share of it, 0 to 1

    All models are in memory at once. Raises UsageError, CheckpointError, LoadError.
    """
    out, source = files.locate(folder), files.locate(against)
    config = open_stored(source).config
    kind = kind_of(config, source)
    kernel.check_engine(options.engine, options.device)  # before headers and weights are read
    devices.find(options.device, torch.float32)
    check_sides(out, source, "bench")
    report = progress or (lambda _doing, _share: None)
    report("loading", 0.0)
    device, trusted = options.device, options.trust_remote_code
    loads = {
        _ORIGINAL: (source, partial(load, source, device=device, trust_remote_code=trusted)),
        _QUANTIZED: (
            out,
            partial(load, out, device=device, engine=options.engine, cache=options.cache, trust_remote_code=trusted),
        ),
    }
    if options.float32 and architecture(config).dtype != "float32":
        in_float32 = partial(load, source, device=device, dtype=torch.float32, trust_remote_code=trusted)
        loads[f"{_ORIGINAL}, float32"] = source, in_float32
    with _threads(options.threads):
        openings = open_in_turns(loads, lambda share: report("opening", share), head=kind == "decoder")
    models = {name: open_() for name, (_, open_) in loads.items()}
    work = _work(kind, models[_ORIGINAL], options)
    with _threads(options.threads):
        turns = {name: partial(work.run, model) for name, model in models.items()}
        samples = take_turns(turns, options.repeats, lambda share: report("measuring", share))
        threads = torch.get_num_threads()
    timings = tuple(
        _timing(name, model, loads[name][0], samples[name], openings[name]) for name, model in models.items()
    )
    return Benchmark(timings, work, options.cache, options.repeats, threads, options.device)


def bytes_on_disk(folder: Path) -> int:
    """Bytes of the weight files of a model folder, all shards together; tokenizer and config are left out."""
    return sum(path.stat().st_size for path in open_stored(folder).weight_files)


def resident_bytes(model: torch.nn.Module) -> int:
    """Bytes of all storages under the model's parameters and buffers: shared ones once, views as the whole they keep
    alive."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*model.parameters(), *model.buffers())
    }
    return sum(storages.values())


def _timing(name: str, model: PreTrainedModel, folder: Path, samples: list[Sample], opening: Opening) -> Timing:
    """A model's samples, put together; what it holds in memory is counted now, behind its runs."""
    speeds = {}
    for figure in samples[0].speeds:
        values = [sample.speeds[figure] for sample in samples]
        speeds[figure] = Speed(median(values), min(values), max(values))
    held = resident_bytes(model)
    return Timing(name, compute(model), speeds, bytes_on_disk(folder), held, samples[0].cache_bytes, opening)


def _work(kind: Kind, original: PreTrainedModel, options: BenchOptions) -> DecoderTurn | EncoderTurn:
    """What a turn is, the same for all models, which have the original's positions. Raises as `_prefill` does."""
    if kind == "decoder":
        return DecoderTurn(_prefill(original, options.prefill, options.decode), options.decode)
    return EncoderTurn(options.batch, min(LENGTH, limits(original, original.config).positions or LENGTH))


def _prefill(model: PreTrainedModel, asked: int | None, decode: int) -> int:
    """Prompt tokens: as asked, else 512 or what is left beside `decode`. Raises UsageError if they do not fit."""
    limit = limits(model, model.config).positions
    chosen = asked or (PREFILL if limit is None else max(min(PREFILL, limit - decode), 1))
    if limit is not None and chosen + decode > limit:
        raise UsageError(
            f"{chosen} prompt tokens and {decode} new ones do not fit into the model's {limit} positions",
            "lower --prefill or --decode",
        )
    return chosen


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Within, torch has so many threads; None: as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
