"""What can be refused from headers and names alone, before torch and transformers are there: within a second.

Whoever runs a command waits for these two longer than for all that is asked here. Nothing is decided here: what is
refused would be refused by `job.prepare`, with the same words, and what passes is asked there once more. So a family
whose names do not tell what is quantized (`overview.told_by_names`) passes.
"""

from __future__ import annotations

from pathlib import Path

from spicerack.errors import RecipeError
from spicerack.models import census, overview, sizes
from spicerack.models.census import BY_DEFAULT
from spicerack.models.opening import open_model
from spicerack.quantization import fitting, recipe
from spicerack.quantization.recipe import Recipe
from spicerack.storage.reader import Checkpoint


def open_float(model: str | Path) -> Checkpoint:
    """The float model in a folder, at a hub id or in a GGUF file, opened. Raises CheckpointError for what is none."""
    checkpoint = open_model(model)
    overview.refuse_quantized(checkpoint)
    return checkpoint


def refuse_shapes(checkpoint: Checkpoint, asked: Recipe) -> None:
    """Raise ShapeError for layers that no whole groups of their scheme tile, where names tell which layers have one.

    checkpoint: of `open_float`. asked: the recipe. A recipe whose rules change nothing, or ask for embeddings, heads or
    routers, is left to `job.prepare`, which knows more of them.
    """
    whole = census.take(checkpoint)
    if not overview.told_by_names(whole, checkpoint):
        return
    entries = [entry for name, entry in whole.entries.items() if name not in whole.tied]
    tied = {alias.removesuffix(".weight"): owner.removesuffix(".weight") for alias, owner in whole.tied.items()}
    try:
        decided = recipe.resolve(asked, {entry.module: entry.role for entry in whole.entries.values()}, tied)
    except RecipeError:
        return
    if any(decided[entry.module].scheme is not None for entry in entries if entry.role not in BY_DEFAULT):
        return
    chosen = {
        entry.module: (scheme, entry.matrix_shape)
        for entry in entries
        if sizes.is_quantized(entry) and (scheme := decided[entry.module].scheme) is not None
    }
    fitting.check(chosen, fit_groups=asked.fit_groups)
