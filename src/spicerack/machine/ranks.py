"""Processes that share one piece of work, as `torchrun` starts them; `ALONE` where there is only one.

They see one file system: hidden states and solved layers go from one to another as files, statistics through
torch.distributed: by NCCL where they are on GPUs, else by gloo. Sums are taken in the order of ranks, so that a number
of ranks always gives the same bytes; another number may not.

What is given up. A rank that dies takes the others with it after `_PATIENCE` at the latest: nobody takes its work over.
What was finished lies in files, and the same command continues there.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed

_PATIENCE = timedelta(days=1)
"""How long one rank waits for another before torch gives it up: one may solve a large layer while the others wait."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """One process among those that work together; frozen, and known before anything is exchanged.

    rank    its number, from 0; rank 0 is the one that writes and speaks
    count   how many there are

    With more than one, whatever exchanges something (`wait`, `total`, `largest`) is called by all of them, in the same
    order, or they wait for each other until `_PATIENCE` is over.
    """

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes what belongs to all."""
        return self.rank == 0

    def wait(self) -> None:
        """Return once all of them have come here."""
        if self.count > 1:
            distributed.barrier()

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of `value`, of one shape and type everywhere, over all ranks: added in their order, the same bits in
        each.

        It takes the memory of all values together; torch's all_reduce takes less, but adds in an order of its own.
        """
        if self.count == 1:
            return value
        parts = [torch.empty_like(value) for _ in range(self.count)]
        distributed.all_gather(parts, value.contiguous())
        result = parts[0]  # first to last on every rank: floating sums depend on their order
        for part in parts[1:]:
            result = result + part
        return result

    def largest(self, value: torch.Tensor) -> torch.Tensor:
        """The elementwise maximum of `value`, of one shape everywhere, over all ranks; `value` itself is not
        changed."""
        if self.count > 1:
            value = value.clone()
            distributed.all_reduce(value, distributed.ReduceOp.MAX)
        return value

    def shares(self, costs: Mapping[str, float]) -> dict[str, int]:
        """Who does what: task -> rank, from task -> cost; the costliest first, each to who has the least to do so far.

        Every rank finds the same, without asking: tasks of one cost go by their names.
        """
        loads = [0.0] * self.count
        owners: dict[str, int] = {}
        for name in sorted(costs, key=lambda name: (-costs[name], name)):
            owners[name] = loads.index(min(loads))
            loads[owners[name]] += costs[name]
        return owners


ALONE = Ranks()
"""The one process of a run that nobody shares."""


def launched() -> Ranks:
    """This process and how many there are, as the environment variables of torchrun say; ALONE without them.

    Nothing is joined yet: what exchanges something needs the process group, which `join` opens, or transformers'
    Trainer for itself.
    """
    return Ranks(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


def join(device: torch.device) -> Ranks:
    """This process as torchrun started it: among the others of its group, which compute on devices of this type.

    device: decides the backend: NCCL for tensors on GPUs with gloo for those on the CPU, else gloo alone. Opens the
    process group if there is none, and closes it at the end of the program. Raises ValueError without torchrun.
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
