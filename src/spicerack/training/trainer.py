"""transformers' Trainer with what training in few bits adds: a teacher, schedules of decay, and no step from NaN.

How it works. The loop is transformers' own: accumulation, mixed precision, DDP, clipping, the state that a checkpoint
holds. What is put in its place here is what it does not know: the loss (a mix of cross-entropy and divergence from a
teacher), the optimizer's groups (each kind of parameter its rate, and decay for matrices only), schedules of rate and
decay that are functions of the step, an evaluation that sharded models can follow, and the mark that tells a whole
checkpoint from half of one. Loss and gradients are looked at in front of each step of the optimizer: one NaN in its
moments would stay there.

What is given up. Methods of the Trainer are overridden that its authors may change, some of them private
(`_get_grad_norm`, `_save_checkpoint`); a test of each effect stands in tests/training, so that a new version of
transformers that calls them no more turns a test red. Options of the Trainer that runs here do not need (label
smoothing, evaluation by epochs, hub, hyper-parameter search) cannot be reached.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import distributed, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Sampler, SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainingArguments

from spicerack.errors import TrainingError
from spicerack.storage.durable import sync
from spicerack.training.callbacks import Decay
from spicerack.training.distillation import Teacher, divergence
from spicerack.training.files import COMPLETE, last_checkpoint
from spicerack.training.qat.prepare import scales
from spicerack.training.schedule import rate
from spicerack.training.settings import Settings
from spicerack.training.text import Order, Subset

_MATRIX = 2
"""Dimensions from which on weights decay; a norm's gain and a bias have fewer, and are pulled nowhere."""


class FewBitsTrainer(Trainer):
    """Trains on rows of tokens, all of one length: by cross-entropy, or mixed with the divergence from a teacher.

    model      what trains, prepared or float; sharded already, or not to be
    args       of transformers' Trainer, as `settings.arguments` makes them
    settings   what those have no words for: rates of their own, the share of the divergence, the schedule
    order      the rows of the whole run
    held_out   rows to evaluate on
    teacher    who predicts; None: cross-entropy alone
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        settings: Settings,
        order: Order,
        held_out: Subset,
        teacher: Teacher | None,
    ) -> None:
        super().__init__(model=model, args=args, train_dataset=order, eval_dataset=order, data_collator=_batch)
        self.model_accepts_loss_kwargs = False  # rows are of one length: the mean over micro-batches is the batch's
        self.settings, self.held_out, self.teacher = settings, held_out, teacher
        self.kl = 0.0 if teacher is None else settings.kl

    # ---- what is minimised ----

    def compute_loss(
        self, model: nn.Module, inputs: Mapping[str, torch.Tensor], *_args: object, **_kwargs: object
    ) -> torch.Tensor:
        """Of one micro-batch, in nats a token: (1 - kl) cross-entropy + kl divergence. With kl = 1 no token is a
        label."""
        ids, numbers = inputs["input_ids"], inputs["numbers"]
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        loss = torch.zeros((), device=logits.device, dtype=torch.float32)
        if self.kl < 1:
            loss = loss + (1 - self.kl) * F.cross_entropy(logits.float(), ids[:, 1:].flatten())
        if self.teacher is not None:
            wanted = self.teacher.predict(numbers.tolist(), ids)
            loss = loss + self.kl * divergence(logits, wanted, self.settings.temperature)
        return loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As Trainer's: the loss of one micro-batch, its gradients added to those that are there.

        Raises TrainingError where the loss is not finite, on all ranks together: one that goes on alone would wait for
        the others for ever.
        """
        loss = super().training_step(*args, **kwargs)
        wrong = (~torch.isfinite(loss)).float()
        if self.args.world_size > 1:
            distributed.all_reduce(wrong, distributed.ReduceOp.MAX)
        if wrong:
            self._refuse(f"the loss is {float(loss)}")
        return loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        """Called in front of each step of the optimizer, which must not see gradients that are not finite.

        A finite loss can have them: float32 overflows in the backward pass, too. The norm is that of all ranks already,
        so that all of them find the same.
        """
        parent: Any = super()
        norm = parent._get_grad_norm(*args, **kwargs)
        if not math.isfinite(float(norm)):
            self._refuse(f"the gradients' norm is {float(norm)}")
        return norm

    def _refuse(self, reason: str) -> NoReturn:
        """Raise TrainingError for the step that is being made."""
        folder = last_checkpoint(Path(str(self.args.output_dir)))
        good = f"the last good checkpoint is {folder}, a model folder" if folder else "there is no checkpoint yet"
        raise TrainingError(
            f"step {self.state.global_step + 1}: {reason}", f"{good}; begin again with a lower learning rate"
        )

    # ---- how ----

    def _get_train_sampler(self, *_args: object, **_kwargs: object) -> Sampler[int]:
        """Places one after the other, of which accelerate gives each rank its own."""
        assert isinstance(self.train_dataset, Order)
        return SequentialSampler(self.train_dataset)  # which is shuffled itself

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW, in groups of one rate each; learned scales, norms and biases do not decay."""
        if self.optimizer is None:
            whole = model or self.model
            assert whole is not None
            # the Trainer logs the rate of the first group, which is to be that of --lr
            ordered = sorted(self._groups(whole).items(), key=lambda group: group[0][0] != self.settings.lr)
            self.optimizer = torch.optim.AdamW(
                [
                    {"params": parts, "lr": lr, "weight_decay": self.args.weight_decay * decays, "decays": decays}
                    for (lr, decays), parts in ordered
                ],
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
            )
        return self.optimizer

    def _groups(self, model: nn.Module) -> dict[tuple[float, bool], list[nn.Parameter]]:
        """(learning rate, whether it decays) -> the parameters that train so, in the model's order."""
        lr = self.settings.lr
        learned = {id(part) for part in scales(model)}
        rates = dict.fromkeys(map(id, _ends(model)), self.settings.embedding_lr or lr)
        rates |= dict.fromkeys(learned, self.settings.scale_lr or lr)  # of embeddings, too
        groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
        for part in model.parameters():
            if part.requires_grad:
                decays = id(part) not in learned and part.dim() >= _MATRIX
                groups.setdefault((rates.get(id(part), lr), decays), []).append(part)
        return groups

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        """The learning rate's, on top of each group's own; the decay's factor is set in front of each step."""
        if self.lr_scheduler is None:
            warmup = self.args.get_warmup_steps(num_training_steps)
            stepped = optimizer or self.optimizer
            assert stepped is not None
            self.lr_scheduler = LambdaLR(
                stepped, lambda step: rate(self.settings.schedule, step, num_training_steps, warmup)
            )
            self.add_callback(Decay(self.args.weight_decay, self.settings.schedule))
        return self.lr_scheduler

    # ---- what is measured ----

    @torch.no_grad()
    def evaluate(self, *_args: object, **_kwargs: object) -> dict[str, float]:
        """Cross-entropy (`eval_loss`), and with a teacher the divergence from its predictions (`eval_kl`), held out.

        Means over the held-out rows in nats a token. Each rank takes its share; all compute equally often, as sharded
        models need: a rank that has no row left computes one that does not count. Raises TrainingError.
        """
        numbers = self.held_out.numbers
        ranks, size = self.args.world_size, self.args.per_device_eval_batch_size
        sums = torch.zeros(3, dtype=torch.float64, device="cpu")
        assert self.model is not None
        model, training = self.model, self.model.training
        model.eval()
        for begin in range(0, len(numbers), size * ranks):
            own = numbers[begin + self.args.process_index * size :][:size]
            sums += self._measured(own if len(own) else numbers[:1], len(own))
        model.train(training)
        if ranks > 1:
            sums = sums.to(self.args.device)
            distributed.all_reduce(sums)
        loss, kl, count = sums.tolist()
        metrics = {"eval_loss": loss / count} | ({} if self.teacher is None else {"eval_kl": kl / count})
        if not math.isfinite(loss):
            self._refuse("the held-out loss is not finite")
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _measured(self, numbers: torch.Tensor, weight: int) -> torch.Tensor:
        """Loss, divergence and 1 of these held-out rows, float64 [3], times `weight`: zeros where they do not count.

        numbers: of the rows, one at least. A rank without rows of its own computes some all the same, and weighs them
        0.
        """
        assert self.model is not None
        ids = self.held_out.rows.ids(numbers.tolist()).to(self.args.device)
        with self.accelerator.autocast():
            logits = self.model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
            if not weight:
                return torch.zeros(3, dtype=torch.float64, device="cpu")
            loss = F.cross_entropy(logits.float(), ids[:, 1:].flatten())
            kl = 0.0
            if self.teacher is not None:
                kl = float(divergence(logits, self.teacher.predict(None, ids), self.settings.temperature))
        return weight * torch.tensor([float(loss), kl, 1.0], dtype=torch.float64, device="cpu")

    def last_metrics(self) -> dict[str, float]:
        """What `evaluate` gave behind the last step; measured now, by all ranks together, if it was not then."""
        done = self.state.global_step
        entries = (entry for entry in self.state.log_history if entry["step"] == done and "eval_loss" in entry)
        return next(entries, None) or self.evaluate()

    # ---- what is kept ----

    def whole_model(self) -> nn.Module:
        """The model without what distributes it: DDP's wrapper, or ours. Its parameters may be sharded still."""
        model: nn.Module = self.accelerator.unwrap_model(self.model)
        return model

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the weights of a checkpoint to the folder. All ranks call it, the first one writes."""
        state = self.state_of_model()
        if self.args.should_save:
            self._save(output_dir, state_dict=state)

    def state_of_model(self) -> dict[str, torch.Tensor]:
        """The model's tensors by their names, each under the first one that it has.

        transformers drops the second names of tied weights only where its own classes declare them; layers that train
        share scales as well, which it knows nothing of.
        """
        assert self.model is not None
        kept: set[int] = set()
        state: dict[str, torch.Tensor] = {}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if id(tensor) not in kept:
                kept.add(id(tensor))
                state[name] = tensor.detach()
        return state

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        """As Trainer's, and then a mark that it is whole: a run that is killed before goes on from the one before."""
        super()._save_checkpoint(model, trial)
        if self.args.world_size > 1:
            distributed.barrier()  # each rank has written the state of its random numbers
        if self.args.should_save:
            folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
            (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle that nobody needs
            for file in folder.iterdir():
                if file.is_file():
                    sync(file)  # the mark must not reach the disk before what it vouches for
            (folder / COMPLETE).touch()
            sync(folder)
            sync(folder.parent)


def _ends(model: nn.Module) -> Iterator[nn.Parameter]:
    """The weights of a language model's embedding and head, whose rate is one of their own; tied ones come twice."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            for end in (part.get_input_embeddings(), part.get_output_embeddings()):
                if end is not None:
                    yield from end.parameters()
            return


def _batch(rows: Sequence[tuple[int, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Rows put together: their ids [B, L] and their numbers [B]."""
    numbers, ids = zip(*rows, strict=True)
    return {"input_ids": torch.stack(ids), "numbers": torch.tensor(numbers, dtype=torch.int64, device="cpu")}
