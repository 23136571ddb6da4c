"""What a quantized cache costs and gains: KL, bytes and speed of the project's language model, cache in 8 and 4 bits.

KL in nats per token of the next-token distributions, float cache against quantized, of the second half of windows of
held-out text: the first half goes through the cache at once, the rest in steps of `--step` tokens. Computed in float32,
so that bfloat16's own noise stays out. Bytes and speed are those of the folder as it ships. Prints the tables of
docs/runtime.md, "Quantized cache".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import click
import torch
from transformers import AutoTokenizer, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

import spicerack
from spicerack.evaluation.intervals import mean_interval
from spicerack.evaluation.turns import take_turns
from spicerack.models.bundled import language_model
from spicerack.nn.cache import QuantizedCache, nbytes
from spicerack.nn.cache_segments import CacheScheme
from spicerack.text.windows import windows

WINDOW, CONTEXT, NEW = 512, 400, 64
SCHEMES = {
    "8": CacheScheme(8),
    "4": CacheScheme(4),
    "4, keys per token": CacheScheme(4, keys="token"),
    "4, values per channel": CacheScheme(4, values="channel"),
    "4, keys per token, values per channel": CacheScheme(4, keys="token", values="channel"),
    "4, no tokens in float": CacheScheme(4, residual=0),
    "4, 64 tokens in float": CacheScheme(4, residual=64),
    "4, 128 tokens in float": CacheScheme(4, residual=128),
    "4, values in groups of 64": CacheScheme(4, group=64),
    "4, values in groups of 16": CacheScheme(4, group=16),
}
MakeCache = Callable[[], Cache]


def caches(model: PreTrainedModel) -> dict[str, MakeCache]:
    config = model.config
    return {
        "float": lambda: DynamicCache(config=config),
        **{name: partial(QuantizedCache, config, scheme=scheme) for name, scheme in SCHEMES.items()},
    }


def through(model: PreTrainedModel, ids: torch.Tensor, cache: Cache, step: int) -> Iterator[torch.Tensor]:
    """Log probabilities [n, V], float64, of the second half of `ids` [1, L]."""
    half = ids.shape[1] // 2
    run: Any = model
    run(input_ids=ids[:, :half], cache=cache, use_cache=True, logits_to_keep=1)
    for part in ids[:, half:].split(step, dim=1):
        yield run(input_ids=part, cache=cache, use_cache=True).logits[0].double().log_softmax(-1)


@torch.no_grad()
def losses(model: PreTrainedModel, ids: torch.Tensor, step: int) -> dict[str, tuple[float, float]]:
    """For each cache: mean KL of one window, and the share of positions with the same most likely token."""
    made = caches(model)
    want = torch.cat(list(through(model, ids, made.pop("float")(), step)))
    found = {}
    for name, make in made.items():
        got = torch.cat(list(through(model, ids, make(), step)))
        kl = (want.exp() * (want - got)).sum(-1).mean()
        found[name] = (float(kl), float((want.argmax(-1) == got.argmax(-1)).double().mean()))
    return found


@torch.no_grad()
def turn(model: PreTrainedModel, make: MakeCache, ids: torch.Tensor) -> dict[str, float]:
    """New tokens per second behind a context `ids` [1, n], and the bytes of the cache there."""
    cache = make()
    run: Any = model
    token = run(input_ids=ids, cache=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
    size = nbytes(cache)
    begin = perf_counter()
    for _ in range(NEW):
        token = run(input_ids=token, cache=cache).logits.argmax(-1)
    return {"tokens": NEW / (perf_counter() - begin), "bytes": size}


@click.command(help=__doc__)
@click.option("--max-windows", type=int, default=24, show_default=True, help=f"Of {WINDOW} tokens; 0: no losses.")
@click.option("--step", type=int, default=16, show_default=True, help="Tokens at once, behind the first half.")
@click.option("--rounds", type=int, default=9, show_default=True, help="Turns of each cache; 0: no speed.")
@click.option("--scheme", default="w8", show_default=True, help="Of the weights, where speed is measured.")
def main(max_windows: int, step: int, rounds: int, scheme: str) -> None:
    folder = language_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = [w.ids[None] for w in windows(folder / "heldout.txt", tokenizer, WINDOW, max(max_windows, 1) * WINDOW)]
    if max_windows:
        _losses(folder, text, step)
    if rounds:
        _speed(folder, scheme, text[0][:, :CONTEXT], rounds)


def _losses(folder: Path, text: list[torch.Tensor], step: int) -> None:
    model = spicerack.load(folder, dtype=torch.float32)
    rows = [losses(model, ids, step) for ids in text]
    click.echo(f"{len(text)} windows of {WINDOW} tokens, the second half in steps of {step}\n")
    click.echo("| bits | KL, nats | more than plain 4 bits, 95 % interval | same top token |\n|---|---|---|---|")
    kls = {name: torch.tensor([row[name][0] for row in rows], dtype=torch.float64) for name in SCHEMES}
    for name, kl in kls.items():
        more = mean_interval(kl - kls["4"])
        same = sum(row[name][1] for row in rows) / len(rows)
        interval = "" if name in "84" or more.lo is None else f"{more.lo:+.6f} to {more.hi:+.6f}"
        click.echo(f"| {name} | {float(kl.mean()):.6f} | {interval} | {same:.2%} |")


def _speed(folder: Path, scheme: str, ids: torch.Tensor, rounds: int) -> None:
    with TemporaryDirectory() as work:
        spicerack.quantize(folder, scheme, output=Path(work) / "out")
        model = spicerack.load(Path(work) / "out")
    made = caches(model)
    turns = {name: partial(turn, model, made[name], ids) for name in ("float", "8", "4")}
    samples = take_turns(turns, rounds, lambda _share: None)
    click.echo(f"\n{CONTEXT} tokens of context, {scheme}, {model.dtype}, {torch.get_num_threads()} threads\n")
    click.echo("| cache | bytes | new tokens/s | least to most | beside float |\n|---|---|---|---|---|")
    for name, taken in samples.items():
        speeds = [s["tokens"] for s in taken]
        ratio = median(a["tokens"] / b["tokens"] for a, b in zip(taken, samples["float"], strict=True))
        click.echo(
            f"| {name} | {int(taken[0]['bytes']):,} | {median(speeds):.0f} | "
            f"{min(speeds):.0f} to {max(speeds):.0f} | {ratio:.2f} |"
        )


if __name__ == "__main__":
    main()
