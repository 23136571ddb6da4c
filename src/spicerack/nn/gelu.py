"""Which activations are the GELU that native plans compute."""

from __future__ import annotations

from typing import TypeGuard

from torch import nn
from transformers.activations import GELUActivation


def is_gelu(module: object) -> TypeGuard[nn.Module]:
    """Whether it is GELU by the error function: what the kernels compute, and not one of its approximations."""
    return type(module) is GELUActivation or (type(module) is nn.GELU and module.approximate == "none")
