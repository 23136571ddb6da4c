"""Processes that share one quantization, as `torchrun` starts them; `ALONE` where there is only one.

They see one file system: hidden states and solved layers go from one to another as files, statistics through
torch.distributed: by NCCL where they are on GPUs, else by gloo. Sums are taken in the order of ranks, so that a number
of ranks always gives the same bytes.
"""

from __future__ import annotations

import atexit
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed

_PATIENCE = timedelta(days=1)
"""One rank may solve a large layer while the others wait."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """rank: this process; count: all of them."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes what belongs to all."""
        return self.rank == 0

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            distributed.barrier()

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in their order."""
        if self.count == 1:
            return value
        parts = [torch.empty_like(value) for _ in range(self.count)]
        distributed.all_gather(parts, value.contiguous())
        result = parts[0]
        for part in parts[1:]:
            result = result + part
        return result

    def largest(self, value: torch.Tensor) -> torch.Tensor:
        """The maximum over all ranks."""
        if self.count > 1:
            value = value.clone()
            distributed.all_reduce(value, distributed.ReduceOp.MAX)
        return value

    def shares(self, costs: Mapping[str, float]) -> dict[str, int]:
        """Who does what: the costliest first, each to the rank with the least to do so far."""
        loads = [0.0] * self.count
        found: dict[str, int] = {}
        for name in sorted(costs, key=lambda name: (-costs[name], name)):
            found[name] = loads.index(min(loads))
            loads[found[name]] += costs[name]
        return found


ALONE = Ranks()


def join(device: torch.device) -> Ranks:
    """This process as torchrun started it: among the others of its group, which compute on devices of this type.

    Raises ValueError without torchrun.
    """
    if not distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, timeout=_PATIENCE)
        atexit.register(_leave)
    return Ranks(distributed.get_rank(), distributed.get_world_size())


def _leave() -> None:
    """gloo's threads must end before the interpreter does, or they may abort the process at its end."""
    if distributed.is_initialized():
        distributed.destroy_process_group()
