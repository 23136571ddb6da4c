"""What a quantized folder gained: size on disk, bytes in memory and speed, beside the model it was made from.

The models take turns (A B A B ...) in one process on the same inputs, so that a machine that slows down, or another
program, meets both. Medians and the whole spread are reported. Tokenizers are not timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel

from spicerack.errors import UsageError
from spicerack.evaluation.evaluate import compute
from spicerack.evaluation.logits import computes_some
from spicerack.kernels import kernel
from spicerack.models.families.names import KEY_VALUE_CACHES
from spicerack.models.kind import kind_of, positions
from spicerack.nn.cache import nbytes
from spicerack.runtime.load import load
from spicerack.storage import files

Progress = Callable[[str, float], None]
Sample = dict[str, float]
"""One turn: figure -> items per second, and for decoders the bytes of the cache."""

PREFILL, DECODE, REPEATS, BATCH, LENGTH = 512, 64, 5, 32, 64
_SEED = 0
_SPEED = "_per_s"


def bench(
    folder: str | Path,
    *,
    against: str | Path,
    prefill: int | None = None,
    decode: int = DECODE,
    batch: int = BATCH,
    repeats: int = REPEATS,
    threads: int | None = None,
    device: str = "cpu",
    float32: bool = False,
    engine: str | None = None,
    cache: int | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Time `folder` and the model it was made from -> {"rows": [...], "speedup": number, ...}.

    A row: name, compute, bytes_on_disk (weight files), resident_bytes (what the parameters and buffers hold in memory
    after a run), and for decoders prefill_tokens_per_s and decode_tokens_per_s, for encoders items_per_s (sequences),
    each a median with `_min` and `_max` beside it; decoders have cache_bytes, too: keys and values at the end of a run.
    speedup: the quantized model's decode_tokens_per_s (items_per_s) over the original's. prefill: None is 512, or what
    the model has room for. float32: time the original in float32, too. engine: of the quantized model, as in
    `load`. cache: bits of its key-value cache; the original's stays as it is. Raises UsageError, CheckpointError,
    LoadError.
    """
    out, source = files.locate(folder), files.locate(against)
    config = files.read_json(source / files.CONFIG, files.MAX_CONFIG_BYTES)
    what = kind_of(config, source)
    report = progress or (lambda _what, _share: None)

    kernel.check_engine(engine, device)

    def open_model(where: Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
        return load(where, device=device, dtype=dtype, trust_remote_code=trust_remote_code)

    report("loading", 0.0)
    quantized = load(out, device=device, engine=engine, cache=cache, trust_remote_code=trust_remote_code)
    models = {"original": open_model(source), "quantized": quantized}
    if float32 and models["original"].dtype != torch.float32:
        models["original, float32"] = open_model(source, torch.float32)
    folders = {name: out if name == "quantized" else source for name in models}
    turn: Callable[[PreTrainedModel], Sample]
    if what == "decoder":
        work = {"prefill": _prefill(models["original"], prefill, decode), "decode": decode}
        turn = partial(_decoder_turn, prefill=work["prefill"], decode=decode)
    else:
        work = {"batch": batch, "length": min(LENGTH, positions(models["original"].config) or LENGTH)}
        turn = partial(_encoder_turn, batch=batch, length=work["length"])
    with _threads(threads):
        turns = {name: partial(turn, model) for name, model in models.items()}
        samples = take_turns(turns, repeats, lambda share: report("measuring", share))
        used = torch.get_num_threads()
    speeds = {name: _speeds(samples[name]) for name in models}
    rows = [
        {
            "name": name,
            "compute": compute(model),
            **speeds[name],
            "bytes_on_disk": bytes_on_disk(folders[name]),
            "resident_bytes": resident_bytes(model),
            **{key: int(samples[name][0][key]) for key in ("cache_bytes",) if key in samples[name][0]},
        }
        for name, model in models.items()
    ]
    figures = [key for key in samples["original"][0] if key.endswith(_SPEED)]
    ratios = {figure: speeds["quantized"][figure] / speeds["original"][figure] for figure in figures}
    return {
        "rows": rows,
        "speedup": ratios[figures[-1]],
        **({"speedup_prefill": ratios[figures[0]]} if what == "decoder" else {}),
        **work,
        **({"cache": cache} if cache is not None else {}),
        "repeats": repeats,
        "threads": used,
        "device": device,
    }


def take_turns(
    turns: Mapping[str, Callable[[], Sample]], repeats: int, progress: Callable[[float], None]
) -> dict[str, list[Sample]]:
    """Every turn once as a warm-up, not counted, then `repeats` rounds of all of them, in order."""
    samples: dict[str, list[Sample]] = {name: [] for name in turns}
    for number in range(repeats + 1):
        for i, (name, turn) in enumerate(turns.items()):
            sample = turn()
            if number:
                samples[name].append(sample)
            progress((number * len(turns) + i + 1) / ((repeats + 1) * len(turns)))
    return samples


def bytes_on_disk(folder: Path) -> int:
    """Bytes of the weight files of a model folder."""
    found = files.find(folder)
    return sum((folder / shard).stat().st_size for shard in found.shards)


def resident_bytes(model: torch.nn.Module) -> int:
    """Bytes of all storages under the model's parameters and buffers: shared ones once, views as the whole they keep
    alive."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*model.parameters(), *model.buffers())
    }
    return sum(storages.values())


@torch.no_grad()
def _decoder_turn(model: PreTrainedModel, *, prefill: int, decode: int) -> Sample:
    """Greedy generation: a prompt of random tokens, then one token at a time."""
    ids = _tokens(model, 1, prefill)
    last = {"logits_to_keep": 1} if computes_some(model) else {}
    begin = _now(model)
    step = model(input_ids=ids, use_cache=True, **last)
    token, name = step.logits[:, -1:].argmax(-1), next(name for name in KEY_VALUE_CACHES if name in step)
    cache = {name: step[name]}
    middle = _now(model)
    for _ in range(decode):
        token = model(input_ids=token, use_cache=True, **cache).logits[:, -1:].argmax(-1)
    end = _now(model)
    return {
        "prefill_tokens_per_s": prefill / (middle - begin),
        "decode_tokens_per_s": decode / (end - middle),
        "cache_bytes": nbytes(cache[name]),
    }


@torch.no_grad()
def _encoder_turn(model: PreTrainedModel, *, batch: int, length: int) -> Sample:
    """One batch of full-length sequences: no padding, so that every model does all the work."""
    ids = _tokens(model, batch, length)
    mask = torch.ones_like(ids)
    begin = _now(model)
    model.base_model(input_ids=ids, attention_mask=mask)
    return {"items_per_s": batch / (_now(model) - begin)}


def _tokens(model: PreTrainedModel, rows: int, columns: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(_SEED)
    vocabulary = int(model.config.get_text_config().vocab_size)
    return torch.randint(vocabulary, (rows, columns), generator=random).to(model.device)


def _now(model: PreTrainedModel) -> float:
    """Seconds, once everything that was asked of the device is done."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def _speeds(samples: list[Sample]) -> dict[str, float]:
    speeds: dict[str, float] = {}
    for key in (key for key in samples[0] if key.endswith(_SPEED)):
        values = [sample[key] for sample in samples]
        speeds |= {key: median(values), f"{key}_min": min(values), f"{key}_max": max(values)}
    return speeds


def _prefill(model: PreTrainedModel, asked: int | None, decode: int) -> int:
    """Prompt tokens: as asked, else 512 or what is left beside `decode`. Raises UsageError if they do not fit."""
    limit = positions(model.config)
    chosen = asked or (PREFILL if limit is None else max(min(PREFILL, limit - decode), 1))
    if limit is not None and chosen + decode > limit:
        raise UsageError(
            f"{chosen} prompt tokens and {decode} new ones do not fit into the model's {limit} positions",
            "lower --prefill or --decode",
        )
    return chosen


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
