"""Factors per channel, moved from the part of a block that makes them into the layers that read them.

    y = W x = (W diag(c)) (x / c),    and x / c comes from dividing what makes x: a norm's gain, or a layer's rows

What the block computes stays as it is; what is rounded changes. Factors pass through whatever is linear in each channel
between the two: a product with a gate, a weighted sum over tokens. `models/families/folds.py` lists where this can be
done.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig

from spicerack.models.families.folds import FOLDS, UNIT_OFFSET
from spicerack.nn import kinds
from spicerack.quantization.calibration.weights import columns_of, shape_of


@dataclass(frozen=True, slots=True)
class Site:
    """A place in a block where factors can be moved.

    source       path of what makes the inputs: a norm, or a linear layer
    readers      paths of the linear layers that have these inputs, and nothing else has
    channels     int64 [K], the source's channel that each input column of the readers comes from; grouped heads share
    unit_offset  the source multiplies by 1 + its weight
    """

    source: str
    readers: tuple[str, ...]
    channels: torch.Tensor
    unit_offset: bool

    def tied(self, factors: torch.Tensor) -> torch.Tensor:
        """The factors [K] with which columns of one channel have one factor, the geometric mean of their own."""
        count = int(self.channels.max()) + 1
        total = torch.zeros(count, dtype=torch.float64, device="cpu").index_add_(
            0, self.channels, factors.double().log()
        )
        return (total / torch.bincount(self.channels, minlength=count)).exp()[self.channels].float()


def sites(block: nn.Module, config: PreTrainedConfig, quantized: Collection[str]) -> Iterator[Site]:
    """Sites of a block, in the order of what runs: those of the model's family whose layers (not norms) are
    `quantized`.

    A layer that stays in float would be rounded anew to its own type, which gains nothing and costs a little.
    """
    paths = dict(block.named_modules())
    for source, readers in FOLDS.get(config.model_type, ()):
        if source not in paths or not set(readers) <= set(quantized):
            continue
        maker, columns = paths[source], {columns_of(paths[reader]) for reader in readers}
        if _is_layer(maker) and source not in quantized:
            continue
        rows = shape_of(maker)[0] if _is_layer(maker) else len(kinds.weight_of(maker))
        channels = _channels(rows, columns.pop(), config) if len(columns) == 1 else None
        if channels is not None:
            yield Site(source, readers, channels, config.model_type in UNIT_OFFSET and not _is_layer(maker))


def move(block: nn.Module, site: Site, factors: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, list[str]]:
    """Divide at the site's source and multiply at its readers by factors [K], in the block itself.

    Returns the factors as they were moved [K], and the paths of parameters that changed and are not weights of layers.
    Those are rounded to `dtype`, in which they are stored; what that changes of a gain is made good at the readers. A
    channel whose gain is 0 keeps it, and has the factor 1: nothing comes out of it that could be multiplied.
    """
    maker = block.get_submodule(site.source)
    weight = block.get_parameter(f"{site.source}.weight")
    by_channel = torch.ones(int(site.channels.max()) + 1, device=factors.device, dtype=torch.float32)
    by_channel[site.channels] = factors
    changed = []
    if _is_layer(maker):
        kinds.of(maker).matrix(weight).div_(by_channel[:, None])
    else:
        gain = weight + 1 if site.unit_offset else weight.clone()
        stored = (gain / by_channel - (1 if site.unit_offset else 0)).to(dtype).float()
        exact = gain / (stored + 1 if site.unit_offset else stored)
        usable = torch.isfinite(exact) & (exact > 0)
        weight.copy_(torch.where(usable, stored, weight))
        by_channel = torch.where(usable, exact, 1.0)
        changed.append(f"{site.source}.weight")
    bias = dict(maker.named_parameters(recurse=False)).get("bias")
    if bias is not None:
        bias.copy_((bias / by_channel).to(dtype))
        changed.append(f"{site.source}.bias")
    factors = by_channel[site.channels]
    for reader in site.readers:
        layer = block.get_submodule(reader)
        kinds.of(layer).matrix(kinds.weight_of(layer)).mul_(factors)
    return factors, changed


def _channels(channels: int, columns: int, config: PreTrainedConfig) -> torch.Tensor | None:
    """The channel, of so many, that each of the columns comes from; None where the counts fit in no way that is known.

    Fewer channels than columns are values of grouped heads: each head is read by several of the attention's.
    """
    if channels == columns:
        return torch.arange(columns, device="cpu")
    heads: int = config.get_text_config().num_attention_heads
    if columns % channels or columns % heads:
        return None
    size, repeats = columns // heads, columns // channels
    numbers = torch.arange(columns, device="cpu")
    return numbers // (size * repeats) * size + numbers % size


def _is_layer(module: nn.Module) -> bool:
    """Whether a source is a linear layer, and no norm."""
    return kinds.find(module) is not None
