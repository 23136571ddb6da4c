"""Data only: what reads the residual stream of a family and what writes to it, by name in checkpoints.

Everything between is invariant to a rotation of that stream once the norms' gains are in the layers behind them: an
RMS norm does not see it, and nothing else touches it.
"""

from typing import NamedTuple


class Residual(NamedTuple):
    """Where a family's residual stream begins, is written to and ends, as modules in checkpoints.

    embedding  what the stream begins with
    blocks     the list of blocks
    writers    layers of a block whose output is added to the stream; `folds` has a block's norms and what reads them
    norm       the last norm, behind all blocks
    head       what reads it
    """

    embedding: str
    blocks: str
    writers: tuple[str, ...]
    norm: str
    head: str


RESIDUAL: dict[str, Residual] = {
    family: Residual(
        "model.embed_tokens",
        "model.layers",
        ("self_attn.o_proj", "mlp.down_proj"),
        "model.norm",
        "lm_head",
    )
    for family in ("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "phi3")
}
"""Families with RMS norms before attention and MLP, and none behind them."""
