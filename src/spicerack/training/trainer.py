"""transformers' Trainer with what training in few bits adds: a teacher, schedules of decay, and no step from NaN."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Sampler, SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from spicerack.errors import TrainingError
from spicerack.storage.durable import sync
from spicerack.training.distillation import Teacher, divergence
from spicerack.training.files import COMPLETE, last_checkpoint
from spicerack.training.qat import prepare
from spicerack.training.schedule import Schedule, decay, rate
from spicerack.training.settings import Settings
from spicerack.training.text import Order, Rows

_MATRIX = 2
"""Dimensions from which on weights decay; norms and biases have fewer."""


class FewBitsTrainer(Trainer):
    """Trains on rows of tokens: cross-entropy, or mixed with the divergence from a teacher.

    held: rows to evaluate on, by their numbers among those of its text.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        settings: Settings,
        order: Order,
        held: tuple[Rows, torch.Tensor],
        teacher: Teacher | None,
    ) -> None:
        super().__init__(model=model, args=args, train_dataset=order, eval_dataset=order, data_collator=_batch)
        self.model_accepts_loss_kwargs = False  # rows are of one length: the mean over micro-batches is the batch's
        self.settings, self.held, self.teacher = settings, held, teacher
        self.kl = 0.0 if teacher is None else settings.kl

    # ---- what is minimised ----

    def compute_loss(self, model: nn.Module, inputs: Any, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        """Of one micro-batch: (1 - kl) cross-entropy + kl divergence."""
        ids, numbers = inputs["input_ids"], inputs["numbers"]
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        loss = torch.zeros((), device=logits.device)
        if self.kl < 1:
            loss = loss + (1 - self.kl) * F.cross_entropy(logits.float(), ids[:, 1:].flatten())
        if self.teacher is not None:
            wanted = self.teacher.predict(numbers.tolist(), ids)
            loss = loss + self.kl * divergence(logits, wanted, self.settings.temperature)
        return loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As Trainer's. Raises TrainingError where the loss is not finite, on all ranks together."""
        loss = super().training_step(*args, **kwargs)
        wrong = (~torch.isfinite(loss)).float()
        if self.args.world_size > 1:
            distributed.all_reduce(wrong, distributed.ReduceOp.MAX)
        if wrong:
            self._refuse(f"the loss is {float(loss)}")
        return loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        """Called in front of each step of the optimizer, which must not see gradients that are not finite."""
        parent: Any = super()
        norm = parent._get_grad_norm(*args, **kwargs)
        if not math.isfinite(float(norm)):
            self._refuse(f"the gradients' norm is {float(norm)}")
        return norm

    def _refuse(self, what: str) -> None:
        folder = last_checkpoint(Path(str(self.args.output_dir)))
        good = f"the last good checkpoint is {folder}, a model folder" if folder else "there is no checkpoint yet"
        raise TrainingError(
            f"step {self.state.global_step + 1}: {what}", f"{good}; begin again with a lower learning rate"
        )

    # ---- how ----

    def _get_train_sampler(self, *_args: Any, **_kwargs: Any) -> Sampler[int]:
        assert isinstance(self.train_dataset, Order)
        return SequentialSampler(self.train_dataset)  # which is shuffled itself

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW; learned scales, norms and biases do not decay."""
        if self.optimizer is None:
            whole = model or self.model
            assert whole is not None
            lr = self.settings.lr
            learned = {id(part) for part in prepare.scales(whole)}
            rates = dict.fromkeys(map(id, _ends(whole)), self.settings.embedding_lr or lr)
            rates |= dict.fromkeys(learned, self.settings.scale_lr or lr)
            groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
            for part in whole.parameters():
                if part.requires_grad:
                    decays = id(part) not in learned and part.dim() >= _MATRIX
                    groups.setdefault((rates.get(id(part), lr), decays), []).append(part)
            ordered = sorted(groups.items(), key=lambda group: group[0][0] != lr)  # the first one's rate is logged
            self.optimizer = torch.optim.AdamW(
                [
                    {"params": parts, "lr": own, "weight_decay": self.args.weight_decay * decays, "decays": decays}
                    for (own, decays), parts in ordered
                ],
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """The learning rate's; the decay's factor is set in front of each step."""
        if self.lr_scheduler is None:
            warmup = self.args.get_warmup_steps(num_training_steps)
            stepped: Any = optimizer or self.optimizer
            self.lr_scheduler = LambdaLR(
                stepped, lambda step: rate(self.settings.schedule, step, num_training_steps, warmup)
            )
            self.add_callback(_Decay(self.args.weight_decay, self.settings.schedule))
        return self.lr_scheduler

    # ---- what is measured ----

    @torch.no_grad()
    def evaluate(self, *_args: Any, **_kwargs: Any) -> dict[str, float]:
        """Cross-entropy, and the divergence from the teacher's predictions if there is one, over the held-out rows.

        Each rank takes its share; all compute equally often, as sharded models need. Nats a token.
        """
        rows, numbers = self.held
        ranks, size = self.args.world_size, self.args.per_device_eval_batch_size
        sums = torch.zeros(3, dtype=torch.float64)
        assert self.model is not None
        model, training = self.model, self.model.training
        model.eval()
        for begin in range(0, len(numbers), size * ranks):
            own = numbers[begin + self.args.process_index * size :][:size]
            counted = len(own) if begin + self.args.process_index * size < len(numbers) else 0
            ids = rows.ids((own if counted else numbers[:1]).tolist()).to(self.args.device)
            with self.accelerator.autocast():
                logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
                if counted:
                    loss = F.cross_entropy(logits.float(), ids[:, 1:].flatten())
                    far = 0.0
                    if self.teacher is not None:
                        far = float(divergence(logits, self.teacher.predict(None, ids), self.settings.temperature))
                    sums += counted * torch.tensor([float(loss), far, 1.0], dtype=torch.float64)
        model.train(training)
        if ranks > 1:
            sums = sums.to(self.args.device)
            distributed.all_reduce(sums)
        loss, far, count = sums.tolist()
        metrics = {"eval_loss": loss / count} | ({} if self.teacher is None else {"eval_kl": far / count})
        if not math.isfinite(loss):
            self._refuse("the held-out loss is not finite")
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ---- what is kept ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Of a checkpoint. All ranks call it, the first one writes."""
        state = self.state_of_model()
        if self.args.should_save:
            self._save(output_dir, state_dict=state)

    def state_of_model(self) -> dict[str, Any]:
        """Tensors by their names, each under the first one; transformers does not know all that tied layers share."""
        assert self.model is not None
        seen: set[int] = set()
        state: dict[str, Any] = {}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                state[name] = tensor.detach()
        return state

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As Trainer's, and then a mark that it is whole: a run that is killed before goes on from the one before."""
        super()._save_checkpoint(model, trial)
        if self.args.world_size > 1:
            distributed.barrier()
        if self.args.should_save:
            folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
            (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle that nobody needs
            for file in folder.iterdir():
                if file.is_file():
                    sync(file)
            (folder / COMPLETE).touch()
            sync(folder)
            sync(folder.parent)


def _ends(model: nn.Module) -> Iterator[nn.Parameter]:
    """The weights of a language model's embedding and head."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            for end in (part.get_input_embeddings(), part.get_output_embeddings()):
                if end is not None:
                    yield from end.parameters()
            return


def _batch(rows: Sequence[tuple[int, torch.Tensor]]) -> dict[str, torch.Tensor]:
    numbers, ids = zip(*rows, strict=True)
    return {"input_ids": torch.stack(ids), "numbers": torch.tensor(numbers)}


class _Decay(TrainerCallback):
    """Sets the weight decay of those that have one, in front of each step."""

    def __init__(self, highest: float, schedule: Schedule) -> None:
        self.highest, self.schedule = highest, schedule

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for group in kwargs["optimizer"].param_groups:
            if group["decays"]:
                group["weight_decay"] = self.highest * decay(self.schedule, state.global_step, state.max_steps)


class Stopping(TrainerCallback):
    """Ends behind a step, with a checkpoint, when `asked` says so on any rank."""

    def __init__(self, asked: Callable[[], bool]) -> None:
        self.asked, self.stopped = asked, False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        asked = torch.tensor(float(self.asked()), device=args.device)
        if args.world_size > 1:
            distributed.all_reduce(asked, distributed.ReduceOp.MAX)
        if asked:
            self.stopped = control.should_save = control.should_training_stop = True
