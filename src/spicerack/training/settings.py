"""How a run trains, in its own words (`Settings`) and in those of transformers' Trainer (`arguments`).

The two are apart because the Trainer's arguments are many, change with its versions, and depend on how many processes
there are; what must agree for a run to continue is said by `Settings` alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from transformers import TrainingArguments

from spicerack.arguments import at_least, check_fields
from spicerack.errors import UsageError
from spicerack.training.qat.start import Stored
from spicerack.training.schedule import Schedule

_BETAS = (0.9, 0.95)
"""AdamW's, as language models are trained since GPT-3 (Brown et al. 2020, appendix B); torch's second one is 0.999."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a run trains; one that is resumed must have the same. Raises UsageError for numbers that make no sense.

    steps           of the optimizer, which is AdamW
    batch           rows a step, over all processes and accumulated gradients
    micro_batch     rows that a process computes at once; None: its whole share of the batch
    length          tokens of a row
    lr, schedule    the highest learning rate, and how it falls
    embedding_lr, scale_lr   those of embeddings and heads, and of learned scales; None: lr
    warmup          share of the steps in which it rises
    weight_decay    of matrices; scales, norms and biases have none
    clip            the gradients' largest norm
    seed            of random weights and of the order of rows
    kl, temperature of distillation: the divergence's share of the loss, and what both logits are divided by
    dtype           that the folder's float tensors and scales are stored in; None: the source's
    bf16            matrix products in bfloat16; weights and their rounding stay float32
    checkpointing   blocks are computed again for the gradient instead of kept
    fsdp            parameters are sharded over the processes (FSDP2); if not, each has all of them (DDP)
    cpu             even if there is an accelerator
    eval_every, save_every, log_every   steps
    """

    steps: int = 1000
    batch: int = 16
    micro_batch: int | None = None
    length: int = 512
    lr: float = 1e-4
    embedding_lr: float | None = None
    scale_lr: float | None = None
    schedule: Schedule = "cosine"
    warmup: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0
    kl: float = 0.5
    temperature: float = 1.0
    dtype: Stored | None = None
    bf16: bool = False
    checkpointing: bool = False
    fsdp: bool = False
    cpu: bool = False
    eval_every: int = 100
    save_every: int = 100
    log_every: int = 10

    def __post_init__(self) -> None:
        check_fields(self)
        at_least(2, length=self.length)
        at_least(
            1, steps=self.steps, batch=self.batch, micro_batch=self.micro_batch, eval_every=self.eval_every,
            save_every=self.save_every, log_every=self.log_every,
        )  # fmt: skip
        for name in ("warmup", "kl"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name} is {getattr(self, name)}", "it is a share, from 0 to 1")
        for name in ("lr", "embedding_lr", "scale_lr", "clip", "temperature"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UsageError(f"{name} is {value}", "use a number above 0")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise UsageError(f"weight_decay is {self.weight_decay}", "use 0 or more")
        if not 0 <= self.seed < 2**32:  # numpy knows no others
            raise UsageError(f"seed is {self.seed}", f"use a number from 0 to {2**32 - 1}")
        for name, known in (("schedule", get_args(Schedule)), ("dtype", (None, *get_args(Stored)))):
            if getattr(self, name) not in known:
                raise UsageError(f"{name} is {getattr(self, name)!r}", f"use one of {', '.join(filter(None, known))}")

    @property
    def rows(self) -> int:
        """Rows that a run looks at, those that come again counted each time."""
        return self.steps * self.batch

    @property
    def tokens(self) -> int:
        """Tokens that a run looks at: those of all its rows."""
        return self.rows * self.length

    def micro(self, processes: int) -> int:
        """Rows that each of some processes computes at once. Raises UsageError where the batch cannot be cut so.

        All micro-batches are of one size: then the mean of their losses is the loss of the batch, and the number of
        processes changes the order of sums only.
        """
        micro = self.micro_batch or max(self.batch // processes, 1)
        if self.batch % (micro * processes):
            raise UsageError(
                f"a batch of {self.batch} rows is not {processes} processes times {micro} rows, or a multiple of it",
                "change the batch, or how much of it a process computes at once (micro_batch)",
            )
        return micro


def arguments(settings: Settings, folder: Path, processes: int) -> TrainingArguments:
    """The settings as transformers' Trainer takes them; joins the processes of torchrun, if there are several.

    folder: where checkpoints go. processes: as `machine.ranks.launched` counts them: how a batch is cut must be known
    before the processes have joined. Raises UsageError where they cannot share the work as asked.
    """
    cpu = settings.cpu or not torch.accelerator.is_available()
    if settings.fsdp and processes == 1:
        raise UsageError("fsdp shards over several processes, and this is one", "start it by torchrun")
    micro = settings.micro(processes)
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=micro,
        gradient_accumulation_steps=settings.batch // (micro * processes),
        learning_rate=settings.lr,
        warmup_steps=round(settings.warmup * settings.steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.clip,
        adam_beta1=_BETAS[0],
        adam_beta2=_BETAS[1],
        seed=settings.seed,
        bf16=settings.bf16,
        use_cpu=cpu,
        ddp_backend="gloo" if cpu and processes > 1 else None,
        ddp_find_unused_parameters=False,
        eval_strategy="steps",
        eval_steps=settings.eval_every,
        save_strategy="steps",
        save_steps=settings.save_every,
        save_total_limit=2,  # the one before the newest is what a crash while saving goes back to
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,  # it would show the last finite loss instead of one that is not
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,  # the Trainer drops what forward() does not name, and rows have numbers
        dataloader_pin_memory=not cpu,
    )
