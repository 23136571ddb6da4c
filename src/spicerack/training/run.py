"""`train`: a model trained in few bits by one call, and the folder that comes out of it.

    start -> text, packed -> prepare_qat -> the Trainer's steps -> freeze -> the folder, read back and measured

Everything before the last arrow lies in `OUT.training`; `OUT` appears whole.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, TrainingArguments, set_seed
from transformers.integrations.integration_utils import TensorBoardCallback

from spicerack._version import __version__
from spicerack.errors import UsageError
from spicerack.numerics.scheme import Scheme
from spicerack.quantization import recipe
from spicerack.quantization.recipe import Recipe, Rule
from spicerack.runtime import hf
from spicerack.runtime.load import load
from spicerack.storage.durable import json_bytes, read_json, sync, write_atomically
from spicerack.storage.reader import Checkpoint
from spicerack.training import files, start
from spicerack.training.distillation import TOP, Cached, Live, Teacher, check_vocabulary
from spicerack.training.qat import prepare as qat
from spicerack.training.qat.start import QATConfig
from spicerack.training.settings import Settings, arguments
from spicerack.training.sharding import ShardedTrainer, shard
from spicerack.training.shipping import loss_of, ship
from spicerack.training.start import Start, Twin
from spicerack.training.text import Order, Rows, prepare
from spicerack.training.trainer import FewBitsTrainer, Stopping

_OBSERVED = 4
"""Rows that ranges of static activations begin with."""
_BEFORE, _SHIPPED = "before.json", "shipped"
REPORT = "training.json"
"""In the folder that comes out: losses, and what they depend on."""


@dataclass(frozen=True, slots=True)
class Trained:
    """What came out. Losses in nats a token on the held-out rows: of the float model, with its weights rounded before
    training, trained, and of the folder read back, by the kernels that it will run on. None where there is none (a run
    in float; the folder is read by the first process).

    kl: the trained model's divergence from the teacher. tokens: seen. resumed_at: step, 0 if from the beginning.
    """

    output: Path
    tokens: int
    seconds: float
    resumed_at: int
    loss_trained: float
    loss_float: float | None = None
    loss_rounded: float | None = None
    loss_shipped: float | None = None
    kl: float | None = None


def train(
    model: str | Path,
    output: str | Path,
    *,
    data: str | Path,
    scheme: str | Scheme | Recipe | None = None,
    rules: Iterable[str | Rule] = (),
    config: QATConfig | None = None,
    settings: Settings | None = None,
    teacher: str | Path | None = None,
    predictions: str | Path | None = None,
    held_out: str | Path | None = None,
    tokenizer: str | Path | None = None,
    twin: Twin | None = None,
    scales_only: bool = False,
    told: Callable[[str], None] = lambda _: None,
    stopping: Callable[[], bool] = lambda: False,
    callbacks: Iterable[TrainerCallback] = (),
) -> Trained:
    """Train a model on text in few bits, and write it, frozen, to the folder `output`.

    model: a folder or hub id; or a config.json, for random weights, with the tokenizer in the folder `tokenizer`, None
    for that of the config. twin: turns a Llama into BitNet's classes. scheme, rules, config: as for `prepare_qat`; no
    scheme: a float model trains in float, to compare with, and a quantized folder goes on in its own, with scales_only
    without changing a code. data, held_out: text as for calibration; without held_out one row of `data` in
    a hundred is held out. teacher: a folder or hub id whose predictions are learned; predictions: a folder to keep them
    in, for other runs too. told: is given sentences on the way. stopping: asked behind each step, whether to save and
    raise KeyboardInterrupt.

    Under torchrun all processes call it. Killed anywhere, the same call continues, to the same bytes. Raises UsageError
    and its kinds, TrainingError where a loss is not finite (checkpoints stay).
    """
    began = time.time()
    for package in ("accelerate", "tensorboard"):
        if find_spec(package) is None:
            raise UsageError(f"training needs the package {package}", "pip install 'spicerack-quant[train]'")
    target = Path(output)
    what = None if scheme is None else recipe.of(scheme, rules)
    settings, config = settings or Settings(), config or QATConfig()
    begin = start.find(model, tokenizer=tokenizer, twin=twin)
    guide = None if teacher is None else Checkpoint.open(teacher)
    if scales_only and not begin.packed:
        raise UsageError(f"{model} is not quantized: its scales cannot train alone", "quantize it first")
    if scales_only and settings.embedding_lr is not None:
        raise UsageError("embeddings do not train where scales do alone", "leave embedding_lr out")
    rounds = what is not None or (begin.packed and not scales_only)
    if not rounds and dataclasses.replace(config, stored=None) != QATConfig():
        raise UsageError("nothing is rounded anew, however it is configured", "name a scheme, or train weights as well")
    if begin.longest is not None and settings.length > begin.longest:
        raise UsageError(
            f"--length {settings.length}: the model has {begin.longest} positions", f"use {begin.longest} or less"
        )
    if guide is None and predictions is not None:
        raise UsageError("there is no teacher whose predictions are kept", "name one")
    stored = settings.dtype or begin.dtype
    config = dataclasses.replace(config, stored=stored)
    args = arguments(settings, files.folder_of(target))
    first = args.process_index == 0
    identity = {
        "model": begin.identity,
        "recipe": None if what is None else what.as_dict(),
        "qat": asdict(config) | {"scales_only": scales_only},
        "settings": asdict(settings),
        "data": str(data),
        "held_out": None if held_out is None else str(held_out),
        "teacher": None if guide is None else guide.fingerprint(),
        "processes": args.world_size,
        "versions": {"spicerack": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }
    with files.entered(target, identity, first=first) as folder:
        with args.main_process_first(local=False):
            rows, numbers, held = prepare(
                data, held_out, begin.tokenizer, folder, length=settings.length, batch=settings.batch,
                steps=settings.steps,
            )  # fmt: skip
        for note in dict.fromkeys((*rows.notes, *held[0].notes)):
            told(note)
        order = Order(rows, numbers, settings.steps * settings.batch, settings.seed)
        tokens = len(order) * settings.length
        told(f"{tokens:,} tokens in {settings.steps} steps, {len(order) / len(numbers):.2f} times through the text")
        set_seed(settings.seed)
        net = begin.model()
        kept = None if guide is None else _teacher(net, guide, rows, predictions, settings, args)
        resumed = files.last_checkpoint(folder)
        measure = partial(loss_of, held=held, batch=args.per_device_eval_batch_size, device=args.device)
        before = {"float": measure(net)} if first and resumed is None and what is not None else {}
        if begin.packed:
            qat.prepare_qat(net, what, config=QATConfig() if scales_only else config, weights=not scales_only)
        elif what is not None:
            some = [{"input_ids": rows.ids(numbers[:_OBSERVED].tolist())}] if what.is_static else ()
            qat.prepare_qat(net, what, config=config, inputs=some)
        if settings.scale_lr is not None and not qat.scales(net):
            raise UsageError("no scale is learned here, so none has a rate", "leave scale_lr out")
        trainer = _trainer(net, args, order, held, settings, kept)
        stop = Stopping(stopping)
        for callback in (stop, *([_curves(folder)] if first else []), *callbacks):
            trainer.add_callback(callback)
        quantized = begin.packed or what is not None
        if resumed is None and quantized:
            rounded = trainer.evaluate()["eval_loss"]
            if first:
                write_atomically(folder / _BEFORE, json_bytes({**before, "rounded": rounded}))
        with hf.quiet():  # it draws a bar for each checkpoint
            trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
        if stop.stopped:
            raise KeyboardInterrupt
        losses = {f"loss_{when}": loss for when, loss in (read_json(folder / _BEFORE) or {}).items()}
        losses |= _last(trainer)
        small = qat.freeze(_whole(trainer)) if quantized else _result(trainer, begin)
        nn.Module.to(small, dtype=getattr(torch, stored))  # scales are in it already, and stay as they are
        if first:
            losses |= {"loss_shipped": measure(ship(small, begin.tokenizer, folder / _SHIPPED))}
            write_atomically(folder / _SHIPPED / REPORT, json_bytes({**losses, "tokens": tokens, "identity": identity}))
            (folder / _SHIPPED).replace(target)
            sync(target.parent)
        at = 0 if resumed is None else int(resumed.name.rpartition("-")[2])
        return Trained(target, tokens=tokens, seconds=time.time() - began, resumed_at=at, **losses)


def _curves(folder: Path) -> TrainerCallback:
    """Losses and rates as TensorBoard reads them."""
    from torch.utils.tensorboard import SummaryWriter  # only where something is trained: an optional package

    return TensorBoardCallback(SummaryWriter(str(folder / "logs")))


def _teacher(
    model: PreTrainedModel,
    guide: Checkpoint,
    rows: Rows,
    predictions: str | Path | None,
    settings: Settings,
    args: TrainingArguments,
) -> Teacher:
    made = load(guide.folder, dtype=torch.bfloat16 if settings.bf16 else torch.float32, device=args.device)
    check_vocabulary(model, made, guide.folder)
    live = Live(made, settings.temperature)
    if predictions is None:
        return live
    identity = {"teacher": guide.fingerprint(), "text": rows.sha256, "temperature": settings.temperature,
                "bf16": settings.bf16}  # fmt: skip
    top = min(TOP, made.config.get_text_config().vocab_size)
    return Cached(live, Path(predictions), rows=len(rows), length=settings.length, identity=identity, top=top)


def _trainer(
    net: PreTrainedModel,
    args: TrainingArguments,
    order: Order,
    held: tuple[Rows, torch.Tensor],
    settings: Settings,
    teacher: Teacher | None,
) -> FewBitsTrainer:
    if settings.checkpointing:
        enable = getattr(net, "activation_checkpointing_enable", None)  # what newer transformers call it
        (enable or net.gradient_checkpointing_enable)()
    if settings.fsdp:
        shard(net, args.device)
    kind = ShardedTrainer if settings.fsdp else FewBitsTrainer
    trainer = kind(net, args, settings, order, held, teacher)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _last(trainer: FewBitsTrainer) -> dict[str, float]:
    """What was measured behind the last step."""
    done = trainer.state.global_step
    measured = (entry for entry in trainer.state.log_history if entry["step"] == done and "eval_loss" in entry)
    found = next(measured, None) or trainer.evaluate()
    return {"loss_trained": found["eval_loss"]} | ({"kl": found["eval_kl"]} if "eval_kl" in found else {})


def _whole(trainer: FewBitsTrainer) -> nn.Module:
    """The model without what distributes it."""
    found: nn.Module = trainer.accelerator.unwrap_model(trainer.model)
    return found


def _result(trainer: FewBitsTrainer, begin: Start) -> nn.Module:
    """The float model, gathered if it was sharded."""
    if not isinstance(trainer, ShardedTrainer):
        return _whole(trainer)
    made = begin.model()
    made.load_state_dict(trainer.state_of_model(), strict=False)
    return made
