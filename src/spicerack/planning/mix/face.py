"""`spicerack.quantize`: by a scheme, as `quantization.run` does it, or with a budget in place of one.

It stands above quantization because what a budget is searched with (evaluation, a pass backwards) does.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, overload

import torch

from spicerack.algorithms.method import Method
from spicerack.arguments import at_least, checked
from spicerack.errors import RecipeError, UsageError
from spicerack.kernels.kernel import Compute
from spicerack.machine import devices
from spicerack.numerics.scheme import Scheme, parse
from spicerack.planning.budget import budget_of
from spicerack.planning.mix import run as mixing
from spicerack.planning.mix.order import Order, prepare
from spicerack.planning.mix.units import PLAIN
from spicerack.planning.sensitivity import Budget
from spicerack.quantization import recipe, run
from spicerack.quantization.recipe import Range, Recipe, Rule
from spicerack.quantization.run import FolderOptions, Progress
from spicerack.quantization.stream import Means
from spicerack.quantization.watch import Watch
from spicerack.storage.files import local
from spicerack.storage.writer import SHARD_BYTES
from spicerack.text.calibration import Calibration


@overload
def quantize(
    model: torch.nn.Module,
    scheme: str | Scheme | Recipe,
    *,
    range_: Range | None = ...,
    rules: Iterable[str | Rule] = ...,
    fit_groups: bool | None = ...,
    for_: str | None = ...,
    compute: Compute | None = ...,
) -> torch.nn.Module: ...
@overload
def quantize(
    model: str | Path,
    scheme: str | Scheme | Recipe | None = ...,
    *,
    output: str | Path,
    size: str | int | None = ...,
    bits: float | None = ...,
    max_kl: float | None = ...,
    max_loss: str | float | None = ...,
    range_: Range | None = ...,
    method: str | Method | None = ...,
    observer: str | None = ...,
    calibration: Calibration | None = ...,
    effort: str = ...,
    rules: Iterable[str | Rule] = ...,
    fit_groups: bool | None = ...,
    for_: str | None = ...,
    device: str = ...,
    threads: int | None = ...,
    memory: int | None = ...,
    shard_bytes: int | None = ...,
    check: bool = ...,
    progress: Progress | bool | None = ...,
) -> dict[str, Any]: ...
@checked
@torch.inference_mode(False)  # solvers take gradients, and what is packed may be trained later
def quantize(
    model: torch.nn.Module | str | Path,
    scheme: str | Scheme | Recipe | None = None,
    *,
    output: str | Path | None = None,
    size: str | int | None = None,
    bits: float | None = None,
    max_kl: float | None = None,
    max_loss: str | float | None = None,
    range_: Range | None = None,
    method: str | Method | None = None,
    observer: str | None = None,
    calibration: Calibration | None = None,
    effort: str = "normal",
    rules: Iterable[str | Rule] = (),
    fit_groups: bool | None = None,
    for_: str | None = None,
    compute: Compute | None = None,
    device: str = "cpu",
    threads: int | None = None,
    memory: int | None = None,
    shard_bytes: int | None = None,
    check: bool = False,
    progress: Progress | bool | None = None,
) -> torch.nn.Module | dict[str, Any]:
    """Quantize a module -> a new module, or a model folder (or hub id) -> the folder `output` and a dict of its sizes.

    model        a module in memory, which is not changed, or a folder or hub id
    scheme       a name such as "w4g128", a Scheme, or a Recipe; None with a budget
    rules        "PATTERN=SCHEME" or "PATTERN=skip"; later ones win, and all over the Recipe's
    fit_groups   layers that no whole groups tile get the nearest scheme that fits, and are not refused; None: as the
                 Recipe says, which is not to
    for_         an engine, such as "llama.cpp" or "vllm", for folders: what it would not compute exactly is refused,
                 with the rule and the nearest scheme, and layers that it has in float stay float
    range_       how scales are chosen, over the Recipe's: "opt" (default, the least error) or "absmax"
    compute      for modules: what packed layers multiply with, as in `load`

    For folders:

    size         in place of a scheme: bytes of the folder's weights, or "4.2GB"; the mix of schemes that loses least
    bits         the same: of a quantized weight, scales counted
    max_kl       the same: the smallest folder whose KL, in nats per token, is not above it on text held out
    max_loss     the same: whose perplexity is not more than "1%" higher, or of an encoder 1 - cosine
    output       the folder to write; if it is there, by the same call before, nothing is left to do
    method       how codes are chosen, over the Recipe's: a chain such as "gptq" or "awq+gptq"
    observer     how static scales of activations are found, over the Recipe's
    calibration  what flows through the model, of `read_calibration`; a quarter of it at most judges a budget
    effort       "high" learns codes below four bits where no method is named, which takes ten times as long and more
    device       where blocks compute while they are calibrated: "cpu", "cuda" ...
    threads      of the CPU; None: one for each core
    memory       bytes that must not be exceeded, pages that are mapped from files left out; None: no limit
    shard_bytes  the largest file to write; None: 2 GB
    check        whether to measure what the folder lost on a few thousand tokens, in a tenth of the run's time and 5 s
                 at least, as the command does unless it is told not to: the figures come under "check". What a budget
                 chose is measured in any case
    progress     True draws the command line's bar on standard error, with the time left; or a function, which is called
                 with the bytes of each source tensor as it is done

    Raises the errors of `spicerack.errors`; a UsageError, of whatever kind, before a weight is quantized, but for a
    bound on loss that no mix keeps.
    """
    at_least(1, threads=threads, memory=memory, shard_bytes=shard_bytes)
    budget = budget_of(size, bits, max_kl, max_loss)
    options = FolderOptions(output, calibration, effort, device, threads, memory, shard_bytes, check, progress)
    if budget is not None:
        if scheme is not None:
            raise UsageError("a budget chooses the scheme, and one is given", "leave one of them out")
        if observer is not None or compute is not None:
            raise UsageError("observer and compute have no use with a budget", "leave them out")
        asked = recipe.of(parse(PLAIN), rules).with_choices(range_, method, None, fit_groups, for_)
        return _with_budget(model, budget, asked, options)
    if scheme is None:
        raise RecipeError("neither a scheme nor a budget is given", "for example scheme='w4g128', or bits=3.5")
    chosen = recipe.of(scheme, rules).with_choices(range_, method, observer, fit_groups, for_)
    if isinstance(model, torch.nn.Module):
        return run.in_memory(model, chosen, compute, options)
    if compute is not None:
        raise UsageError("compute is no property of a folder", "pass it to load(folder, compute=...)")
    return run.of_folder(model, chosen, options).as_dict()


def _with_budget(
    model: torch.nn.Module | str | Path, budget: Budget, asked: Recipe, options: FolderOptions
) -> dict[str, Any]:
    """A folder of the mix that a budget buys. Raises UsageError without an output or text, and of a module."""
    if isinstance(model, torch.nn.Module):
        raise UsageError("a budget is for folders", "save the module as a folder, or name a scheme")
    if options.output is None:
        raise UsageError(f"no output folder for {model}", "pass output='...'")
    if options.calibration is None:
        raise UsageError("a budget needs text to measure losses on", "pass calibration=spicerack.read_calibration(...)")
    means = Means(devices.find(options.device), options.threads, options.memory)
    order = Order(
        model, local(options.output), budget, asked, options.effort, options.calibration, means,
        options.shard_bytes or SHARD_BYTES,
    )  # fmt: skip
    told = options.progress is True

    def tell(sentence: str) -> None:
        if told:
            print(sentence, file=sys.stderr)

    watch = run.Progressing(options.progress) if callable(options.progress) else Watch()
    return mixing.run(prepare(order), watch, tell).as_dict()
