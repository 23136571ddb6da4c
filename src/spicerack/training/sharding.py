"""Parameters, gradients and the optimizer's state sharded over processes: torch's FSDP2, on any device.

How it works. Each process keeps its share of every parameter, of its gradient and of the optimizer's moments; a block's
parameters are gathered while it computes and let go behind it. transformers' Trainer would ask accelerate to do this,
which shards on accelerators only, and rounds a parameter for mixed precision before a layer sees it, learned scales
too; here parameters stay float32, and autocast is for products alone. Checkpoints hold whole tensors: they are the same
files as those of other runs, each a model folder that can be loaded.

What is given up. Every process reads the whole model before it is sharded, and has the whole teacher; a checkpoint is
gathered in the memory of the first process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from spicerack.models.blocks.find import repeated
from spicerack.training.trainer import FewBitsTrainer

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
"""Gathered to the first rank, on the CPU."""
_LOADED = StateDictOptions(full_state_dict=True, strict=False)
"""From whole tensors, which every rank has read; names of tied weights that a checkpoint leaves out may be missing."""


def shard(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """`model` on `device`, changed in place: each of its repeated blocks a unit that is gathered while it computes.

    All ranks call it, with the same weights. Raises UsageError for a model without repeated blocks.
    """
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    nn.Module.to(model, device)
    for block in repeated(model)[1]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)  # what is in no block: embeddings, the last norm, the head
    return model


class _Wrapped(nn.Module):
    """A sharded model as the Trainer sees it: distributed already; it would wrap any other in DDP.

    What is kept of the Trainer's wrapping is autocast, and that micro-batches before the last exchange nothing.
    """

    def __init__(self, module: nn.Module, trainer: FewBitsTrainer) -> None:
        super().__init__()
        self.module = module
        self._autocast = trainer.accelerator.autocast

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own, under autocast where the run multiplies in bfloat16."""
        with self._autocast():
            return self.module(*args, **kwargs)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients of micro-batches before the last stay unreduced."""
        assert isinstance(self.module, FSDPModule)
        self.module.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.module.set_requires_gradient_sync(True)


class ShardedTrainer(FewBitsTrainer):
    """The Trainer for models that `shard` returned: the same steps, with checkpoints that are gathered and dealt
    out."""

    def _wrap_model(self, model: nn.Module, *_args: object, **_kwargs: object) -> nn.Module:
        """In place of the Trainer's: DDP would want whole parameters."""
        return _Wrapped(model, self)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm over all shards, as a plain number: what clipping returns is a sharded one, or nothing at all."""
        norm = self.accelerator.clip_grad_norm_(model.parameters(), float("inf")) if grad_norm is None else grad_norm
        return super()._get_grad_norm(model, norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def evaluate(self, *args: object, **kwargs: object) -> dict[str, float]:
        """Leaves parameters sharded, which a forward without a backward does not, and which all others expect."""
        metrics = super().evaluate(*args, **kwargs)
        assert self.model is not None
        for part in self.model.modules():
            if isinstance(part, FSDPModule):
                part.reshard()
        return metrics

    def state_of_model(self) -> dict[str, torch.Tensor]:
        """The model's tensors, gathered on the CPU of the first rank; {} in the others, which must call it, too."""
        assert self.model is not None
        names = set(super().state_of_model())
        whole: dict[str, Any] = get_model_state_dict(self.model, options=_WHOLE)
        return {name: tensor for name, tensor in whole.items() if name in names}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Whole tensors, which every rank reads, each taking its share. What is not there must be a second name."""
        assert self.model is not None
        state: dict[str, Any] = load_file(Path(resume_from_checkpoint) / "model.safetensors")
        missing, unexpected = set_model_state_dict(self.model, state, options=_LOADED)
        assert not unexpected and not set(missing) & set(super().state_of_model()), (missing, unexpected)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Moments of whole parameters, by their names, so that any number of processes could read them."""
        assert self.model is not None
        state = get_optimizer_state_dict(self.model, self._plain_optimizer(), options=_WHOLE)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / "optimizer.pt")
            assert self.lr_scheduler is not None
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The same, back into each rank's share."""
        if checkpoint is None:
            return
        assert self.model is not None and self.lr_scheduler is not None
        state = torch.load(Path(checkpoint) / "optimizer.pt", weights_only=True)
        set_optimizer_state_dict(self.model, self._plain_optimizer(), state, options=_LOADED)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))

    def _plain_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer without the wrapper that accelerate puts around it in front of the first step."""
        assert self.optimizer is not None
        optimizer = self.optimizer
        plain: torch.optim.Optimizer = vars(optimizer).get("optimizer", optimizer)
        return plain
