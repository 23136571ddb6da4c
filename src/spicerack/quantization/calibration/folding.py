"""Factors per channel, moved from the part of a block that makes them into the layers that read them.

    y = W x = (W diag(c)) (x / c),    and x / c comes from dividing what makes x: a norm's gain, or a layer's rows

What the block computes stays as it is; what is rounded changes. `models/folds.py` lists where this can be done.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from spicerack.models.families.folds import FOLDS, UNIT_OFFSET


@dataclass(frozen=True, slots=True)
class Site:
    """Where factors can be moved. source, readers: paths in the block.

    channels: int64 [K], the source's channel that each input column of the readers comes from: grouped heads share one.
    """

    source: str
    readers: tuple[str, ...]
    channels: torch.Tensor
    unit_offset: bool

    def tied(self, factors: torch.Tensor) -> torch.Tensor:
        """[K], columns of one channel with their geometric mean."""
        count = int(self.channels.max()) + 1
        total = torch.zeros(count, dtype=torch.float64).index_add_(0, self.channels, factors.double().log())
        return (total / torch.bincount(self.channels, minlength=count)).exp()[self.channels].float()


def sites(block: nn.Module, config: PreTrainedConfig, quantized: Collection[str]) -> Iterator[Site]:
    """Those of the family, in the order of what runs, whose layers (not norms) are all quantized.

    A layer that stays in float would be rounded anew to its own type, which gains nothing and costs a little.
    """
    paths = dict(block.named_modules())
    for source, readers in FOLDS.get(config.model_type, ()):
        if source not in paths or not set(readers) <= set(quantized):
            continue
        maker, columns = paths[source], {_columns(paths[reader]) for reader in readers}
        if isinstance(maker, (nn.Linear, Conv1D)) and source not in quantized:
            continue
        channels = _channels(len(_rows(maker)), columns.pop(), config) if len(columns) == 1 else None
        if channels is not None:
            yield Site(source, readers, channels, config.model_type in UNIT_OFFSET and not _is_layer(maker))


def move(block: nn.Module, site: Site, factors: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, list[str]]:
    """Divide at the source, multiply at the readers, in place -> (the factors as moved [K], parameters that changed
    and are not weights of layers).

    Those are rounded to `dtype`, in which they are stored; what that changes of a gain is made good at the readers.
    """
    maker = block.get_submodule(site.source)
    weight = block.get_parameter(f"{site.source}.weight")
    by_channel = torch.ones(int(site.channels.max()) + 1, device=factors.device)
    by_channel[site.channels] = factors
    changed = []
    if _is_layer(maker):
        rows = weight.t() if isinstance(maker, Conv1D) else weight
        rows.div_(by_channel[:, None])
    else:
        gain = weight + 1 if site.unit_offset else weight.clone()
        stored = (gain / by_channel - (1 if site.unit_offset else 0)).to(dtype).float()
        moved = gain / (stored + 1 if site.unit_offset else stored)
        usable = torch.isfinite(moved) & (moved > 0)
        weight.copy_(torch.where(usable, stored, weight))
        by_channel = torch.where(usable, moved, 1.0)
        changed.append(f"{site.source}.weight")
    bias = dict(maker.named_parameters(recurse=False)).get("bias")
    if bias is not None:
        bias.copy_((bias / by_channel).to(dtype))
        changed.append(f"{site.source}.bias")
    factors = by_channel[site.channels]
    for reader in site.readers:
        columns = block.get_parameter(f"{reader}.weight")
        columns.mul_(factors[:, None] if isinstance(block.get_submodule(reader), Conv1D) else factors)
    return factors, changed


def _channels(made: int, read: int, config: PreTrainedConfig) -> torch.Tensor | None:
    """Of each column; None where the counts fit in no way that is known."""
    if made == read:
        return torch.arange(read)
    heads: int = config.get_text_config().num_attention_heads
    if read % made or read % heads:
        return None
    size, repeats = read // heads, read // made
    columns = torch.arange(read)
    return columns // (size * repeats) * size + columns % size


def _rows(module: nn.Module) -> torch.Tensor:
    weight = module.get_parameter("weight")
    return weight.t() if isinstance(module, Conv1D) else weight


def _columns(module: nn.Module) -> int:
    weight = module.get_parameter("weight")
    return weight.shape[0] if isinstance(module, Conv1D) else weight.shape[1]


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))
