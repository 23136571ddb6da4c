"""A trial before hours of work: the model's first blocks, quantized, written, loaded again, and compared.

Its layers are rounded to nearest behind the recipe's transforms: what is tried is not the solver but all around it, the
schemes on these shapes, the format, the new config.json, what reads it. The calibrated loop knows what comes out of its
last block; the folder that was written must give the same when it is loaded.

It is timed as well: the first block is solved once more, with two short texts, and what the second one took longer is
what text costs. So the whole run's time is known before it begins, as far as blocks are alike.

What is given up. Only the first blocks are tried, on a few short sequences: a model whose later blocks are of another
kind can still fail there. A model that cannot be cut to two blocks (its config says more of them than a number) is not
tried at all.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from spicerack.algorithms import solver as solvers
from spicerack.algorithms.method import Method
from spicerack.errors import CheckpointError, LoadError, RecipeError, UsageError
from spicerack.machine.ranks import ALONE
from spicerack.models.architecture import destinations, on_meta
from spicerack.models.blocks.find import repeated
from spicerack.models.blocks.look import output_of
from spicerack.models.config import LAYERS
from spicerack.quantization.calibration.chunks import Text, tokens
from spicerack.quantization.calibration.states import States, blocks_folder
from spicerack.quantization.job import Job, decide
from spicerack.quantization.rotation import original
from spicerack.quantization.stream import Means, Stream, calibrate, identity, plan
from spicerack.quantization.watch import Finished, Trial, Watch
from spicerack.runtime.load import load, load_apart
from spicerack.text.calibration import Calibration

BLOCKS = 2
"""Blocks that are tried: with the second one, hidden states that a quantized block made go through another."""
FEWEST = 6
"""Blocks of a model that is worth it: smaller ones are soon done themselves."""
SEQUENCES, LENGTH = 4, 64
"""Of the text: how many sequences, and tokens of each; what is compared needs no more."""
TIMED = (2, 6)
"""Of the text: sequences, of the whole length, that the first block is solved with to know what all of it takes."""
SAME = 0.02
"""Of the output, how far off it may be: roundings of activations that fall the other way."""


def run(whole: Job, calibration: Calibration, folder: Path, means: Means) -> Trial | None:
    """Try the first blocks of `whole` in `folder`, which is removed again, on a few short sequences of the text.

    whole         the job; its recipe has a method
    calibration   the text, of which the beginning is used
    folder        a place for what is tried; whatever is there goes
    means         as for the run; this process alone, without a limit of memory

    None where there is nothing to gain, or the model cannot be cut. Raises LoadError if what is loaded computes
    something else than what was computed while it was quantized, and what the stages of a run raise.
    """
    begin = time.monotonic()
    assert whole.recipe.method is not None, "decided before work starts"
    cut = _first_blocks(whole, BLOCKS, Method(whole.recipe.method.transforms))
    if cut is None:
        return None
    part, path, count = cut
    mask = None if calibration.mask is None else calibration.mask[:SEQUENCES, :LENGTH]
    text = dataclasses.replace(calibration, ids=calibration.ids[:SEQUENCES, :LENGTH], mask=mask)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        last = _quantized(part, text, folder / "out", dataclasses.replace(means, memory=None, ranks=ALONE))
        inputs = Text(text, SEQUENCES).inputs(slice(None))
        model = load(folder / "out", compute="float", dtype=torch.float32)
        loaded = tokens(output_of(model, f"{path}.{BLOCKS - 1}", inputs), inputs)
        computed = tokens(last.output, inputs)[:, : loaded.shape[-1]]  # behind them is what blocks leave for later ones
        difference = float((loaded - computed).norm() / computed.norm())
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if not difference <= SAME:
        raise LoadError(
            f"preflight: the first {BLOCKS} blocks, quantized, saved and loaded again, compute something that is "
            f"{difference:.2%} off",
            "this is a fault of spicerack: please report it with the model's config.json",
        )
    seconds, solver = time.monotonic() - begin, solvers.opening_name(whole.recipe.method.solver)
    expected = None
    if len(calibration.ids) > TIMED[-1]:
        took = _timed(whole, calibration, folder, solver, dataclasses.replace(means, memory=None, ranks=ALONE))
        expected = None if took is None else expect(count, len(calibration.ids), TIMED, took) / means.ranks.count
    return Trial(BLOCKS, count, difference, last.error, seconds, solver, expected, last.seconds * count / BLOCKS)


def expect(blocks: int, sequences: int, texts: tuple[int, int], took: tuple[float, float]) -> float:
    """Seconds that so many blocks take with so many sequences of text, by what one took with two texts.

    texts: sequences of them, the shorter first. took: the seconds of each.
    """
    each = max(took[1] - took[0], 0.0) / (texts[1] - texts[0])
    return blocks * (took[1] + each * (sequences - texts[1]))


def _timed(whole: Job, calibration: Calibration, folder: Path, solver: str, means: Means) -> tuple[float, float] | None:
    """Seconds that the first block takes with each of the texts of `TIMED`; None where it cannot be cut off alone."""
    assert whole.recipe.method is not None, "decided before work starts"
    cut = _first_blocks(whole, 1, Method(whole.recipe.method.transforms, solver))
    if cut is None:
        return None
    took = []
    for count in TIMED:
        mask = None if calibration.mask is None else calibration.mask[:count]
        text = dataclasses.replace(calibration, ids=calibration.ids[:count], mask=mask)
        blocks_folder(folder / "out").mkdir(parents=True)
        try:
            last = calibrate(cut[0], text, plan(cut[0], text, None), folder / "out", means, Watch())
        except UsageError:  # a block alone may not do what it does in front of others
            return None
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        assert last is not None, "nothing of it is there yet"
        took.append(last.seconds)
    return took[0], took[1]


class _LastBlock(Watch):
    """Keeps what comes out of the last block, [B, L, H], and its error; its file goes when the folder is finished."""

    output: torch.Tensor
    error: float
    seconds = 0.0

    def __init__(self, folder: Path) -> None:
        self._blocks = blocks_folder(folder)

    def finished(self, block: Finished) -> None:
        """See `Watch.finished`: hidden states behind the block are on disk now, and read before they go."""
        self.seconds += block.seconds
        if block.number == BLOCKS - 1:
            self.output, self.error = States(self._blocks, 1).read(BLOCKS, 0)[0], block.error


def _quantized(part: Job, text: Calibration, output: Path, means: Means) -> _LastBlock:
    """Write the job into `output` -> what its last block was seen to compute."""
    last = _LastBlock(output)
    planned = plan(part, text, means.memory)
    stream = Stream(part, output, identity(part, text, planned, means))
    calibrate(part, text, planned, output, means, last)
    stream.write(means.workers, last)
    stream.finish({})
    return last


def _first_blocks(whole: Job, first: int, method: Method) -> tuple[Job, str, int] | None:
    """The job for a model of the first blocks only, their list's path, and how many there are in all.

    first: how many. method: in place of the recipe's.
    """
    source = original(whole.source)
    model = on_meta(source.config)
    if model is None:
        return None
    path, stack = repeated(model)
    if len(stack) < FEWEST:
        return None
    dropped = tuple(f"{path}.{number}." for number in range(first, len(stack)))
    places = destinations(model, source.tensors)
    tensors = {
        name: info for name, info in source.tensors.items()
        if name not in places or not places[name].parameter.startswith(dropped)
    }  # fmt: skip
    part = dataclasses.replace(source, config=_cut(source.config, len(stack), first), tensors=tensors)
    recipe = dataclasses.replace(whole.recipe, method=method)
    try:
        load_apart(part)
        return decide(part, recipe, with_text=True), path, len(stack)
    except (CheckpointError, LoadError, RecipeError):  # its config has more to say of blocks; a rule for later ones
        return None


def _cut(config: Mapping[str, Any], count: int, first: int) -> dict[str, Any]:
    """The config of a model with the `first` of its `count` blocks: their number, and lists with an entry for each."""

    def one(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return _cut(value, count, first)
        if key in LAYERS and value == count:
            return first
        return value[:first] if isinstance(value, list) and len(value) == count else value

    return {key: one(key, value) for key, value in config.items()}
