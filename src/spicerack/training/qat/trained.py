"""`TrainedLayer`: what all layers that are trained in few bits have in common, so that `freeze` asks no class.

A loop sees them as ordinary modules with ordinary parameters; `freeze` asks each what it will be stored as, by what is
shared, and by the codes that it computes with.
"""

from __future__ import annotations

import torch
from torch import nn

from spicerack.nn.kinds import LayerKind
from spicerack.numerics.qtensor import QTensor
from spicerack.numerics.scheme import Scheme


class TrainedLayer(nn.Module):
    """In the place of a float or packed layer while it trains: see `fake_layers`, `tuned_layers`.

    kind: of the layer that it stands for.
    """

    kind: LayerKind

    @property
    def scheme(self) -> Scheme:
        """What it will be stored in."""
        raise NotImplementedError

    @property
    def tied(self) -> nn.Parameter:
        """The parameter that layers which are tied have in common."""
        raise NotImplementedError

    @property
    def largest(self) -> torch.Tensor:
        """The tensor of the weight's size, which no copy needs once the layer is packed."""
        raise NotImplementedError

    @property
    def weight_dtype(self) -> torch.dtype:
        """The float type of the weight that it stands for."""
        raise NotImplementedError

    def qtensor(self, name: str) -> QTensor:
        """The codes and scales that `forward` computes with. name: of the weight, for errors. Raises WeightError."""
        raise NotImplementedError
