"""`train`: a model trained in few bits by one call, and the folder that comes out of it.

    start -> text, packed -> prepare_qat -> the Trainer's steps -> freeze -> the folder, read back and measured

How it works. What a run is asked to do becomes a `Job`, which refuses what cannot be. Everything before the last arrow
lies in `OUT.training`; `OUT` appears whole, by one rename. The model computes with the weights that would be stored
while its float weights learn, so that freezing it rounds nothing that training did not see. Losses are measured in
front of the first step (of the float model, and with its weights rounded), behind the last one, and of the folder that
was written, by the kernels that it will run on: the four that tell what rounding cost, what training won back, and
whether the folder kept it.

A run can be killed anywhere. Its order of rows, its text and its schedule depend on its settings alone, and the states
of the optimizer and of random generators are in each checkpoint, so that the same call goes on from the last whole
checkpoint, to the same bytes.

What is given up. Weights, gradients and AdamW's moments are float32, sixteen bytes a parameter, whatever the scheme:
few bits save memory in what comes out, not while it is learned. The same bytes need the same number of processes,
because their sums have an order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, TrainingArguments, set_seed

from spicerack.arguments import checked
from spicerack.errors import UsageError, counted
from spicerack.machine.ranks import launched
from spicerack.models.inputs import check_text
from spicerack.numerics.scheme import Scheme
from spicerack.quantization.recipe import Recipe, Rule
from spicerack.runtime import hf
from spicerack.runtime.load import load
from spicerack.storage.durable import json_bytes, read_json, sync, write_atomically
from spicerack.storage.files import local
from spicerack.storage.reader import Checkpoint
from spicerack.training import files, text
from spicerack.training.callbacks import Stopping, Watch, curves
from spicerack.training.distillation import TOP, Cached, Live, Teacher, check_vocabulary
from spicerack.training.job import Job, TrainOptions, prepare
from spicerack.training.qat.prepare import freeze, prepare_qat, scales
from spicerack.training.qat.start import QATConfig
from spicerack.training.settings import Settings, arguments
from spicerack.training.sharding import ShardedTrainer, shard
from spicerack.training.shipping import loss_of, ship
from spicerack.training.start import Twin
from spicerack.training.text import Corpus, Order
from spicerack.training.trainer import FewBitsTrainer

_OBSERVED = 4
"""Rows that ranges of static activations begin with: they learn from there, or follow as moving averages."""
_CHECKPOINTING = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
"""What versions of transformers call it, the newest first."""
_FIGURES = frozenset({"loss_trained", "loss_float", "loss_rounded", "loss_shipped", "kl"})
"""Fields of `Trained` that the report in the folder has, where they were measured."""


@dataclass(frozen=True, slots=True)
class Trained:
    """What came out of a run. Losses are in nats a token on the held-out rows; None where there is none (a run in
    float; the folder is read by the first process).

    output         the folder
    tokens         how many were learned from, those that came again counted each time
    seconds        of this call
    resumed_at     step at which it went on; 0 if from the beginning
    loss_trained   of the trained model
    loss_float     of the float model, before
    loss_rounded   with its weights rounded, before training
    loss_shipped   of the folder, read back, by the kernels that it will run on
    kl             the trained model's divergence from the teacher
    already_there  whether an earlier call of the same had finished it, so that nothing was left to do
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
    already_there: bool = False


@checked
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
    notify: Callable[[str], None] = lambda _: None,
    stopping: Callable[[], bool] = lambda: False,
    callbacks: Iterable[TrainerCallback] = (),
) -> Trained:
    """Train a model on text in few bits, and write it, frozen, to the folder `output`.

    model        a folder or hub id; or a config.json, for random weights. A quantized folder goes on in its own scheme
    output       the folder to write; if it is there, by the same call before, nothing is left to do
    data         text to learn from, as for calibration: a file, JSON lines, a folder, a dataset
    scheme, rules, config   as for `prepare_qat`; without a scheme a float model trains in float, to compare with
    settings     steps, rates, batch ...; None: the defaults of `Settings`
    teacher      a folder or hub id whose predictions are learned
    predictions  a folder to keep these in, for other runs too
    held_out     text to measure on; None: one row of `data` in a hundred is held out
    tokenizer    folder, for a config.json; None: that of the config
    twin         turns a Llama into BitNet's classes
    scales_only  of a quantized folder: no code changes
    notify       is given sentences on the way
    stopping     is asked behind each step whether to save and raise KeyboardInterrupt
    callbacks    of transformers' Trainer, beside its own

    Under torchrun all processes call it. Killed anywhere, the same call continues, to the same bytes. Raises UsageError
    and its kinds, TrainingError where a loss is not finite (checkpoints stay).
    """
    options = TrainOptions(
        data=data, scheme=scheme, rules=rules, config=config or QATConfig(), settings=settings or Settings(),
        teacher=teacher, predictions=predictions, held_out=held_out, tokenizer=tokenizer, twin=twin,
        scales_only=scales_only,
    )  # fmt: skip
    return execute(model, output, options, Watch(notify, stopping, tuple(callbacks)))


def execute(model: str | Path, output: str | Path, options: TrainOptions, watch: Watch) -> Trained:
    """As `train`, with what is asked for, and who looks on, as one object each.

    model: a folder or hub id, or a config.json. output: the folder to write. Raises what `train` raises, and
    KeyboardInterrupt, behind a checkpoint, where the watch asked for an end.
    """
    began = time.time()
    _require_packages()
    job = prepare(model, local(output), options)
    args = arguments(job.settings, files.folder_of(job.output), launched().count)
    identity = job.identity(args.world_size)
    if (report := files.report_of(job.output, identity)) is not None:
        losses = {name: value for name, value in report.items() if name in _FIGURES}
        return Trained(job.output, report["tokens"], time.time() - began, 0, already_there=True, **losses)
    with files.entered(job.output, identity, first=args.process_index == 0) as folder:
        run = _with_text(job, args, folder, watch.notify)
        trainer = _begin(run, watch)
        _take_steps(run, trainer)
        return _finish(run, trainer, began)


def _require_packages() -> None:
    """Raises UsageError for a package that only training needs, and that is not there."""
    for package in ("accelerate", "tensorboard"):
        if find_spec(package) is None:
            raise UsageError(f"training needs the package {package}", "pip install 'spicerack-quant[train]'")


@dataclass(frozen=True, slots=True)
class _Run:
    """A job at work in one process.

    job          what is asked for
    args         of transformers' Trainer; they know which process this is
    folder       `OUT.training`
    corpus       rows to learn from and to measure on
    checkpoint   what it goes on from; None from the start
    """

    job: Job
    args: TrainingArguments
    folder: Path
    corpus: Corpus
    checkpoint: Path | None

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes what belongs to all."""
        return int(self.args.process_index) == 0

    def loss_of(self, model: PreTrainedModel) -> float:
        """Its loss on the held-out rows, nats a token, in its own float type; moves it to the run's device."""
        return loss_of(model, self.corpus.held_out, self.args.per_device_eval_batch_size, self.args.device)


def _with_text(job: Job, args: TrainingArguments, folder: Path, tell: Callable[[str], None]) -> _Run:
    """The run with its text packed: by the first process of all, while the others wait, who then find it there.

    tell: is given the text's notes, and how often the run goes through it. Raises TextError for text that is no use, or
    too little.
    """
    settings = job.settings
    with args.main_process_first(local=False):
        corpus = text.read(
            job.data, job.held_out, job.start.tokenizer, folder, length=settings.length, batch=settings.batch,
            steps=settings.steps,
        )  # fmt: skip
    for note in corpus.notes:
        tell(note)
    times = settings.rows / len(corpus.train)
    tell(
        f"{counted(settings.tokens, 'token')} in {counted(settings.steps, 'step')}, {times:.2f} times through the text"
    )
    return _Run(job, args, folder, corpus, files.last_checkpoint(folder))


def _begin(run: _Run, watch: Watch) -> FewBitsTrainer:
    """The Trainer in front of its first step, or of the one behind its checkpoint.

    Of a run that begins, the losses before the first step are written down: one that continues cannot measure them.
    """
    job = run.job
    set_seed(job.settings.seed)  # before the model is made, whose random weights come from it
    net = job.start.model()
    check_text(net, head=True)
    teacher = None if job.teacher is None else _teacher(run, job.teacher, net)
    begins = run.checkpoint is None
    # of a model that is packed already there is no float one to measure
    before = {"float": run.loss_of(net)} if begins and run.first and job.recipe is not None else {}
    _prepare(run, net)
    trainer = _trainer(run, net, teacher)
    for callback in (Stopping(watch.stopping), *([curves(run.folder)] if run.first else []), *watch.callbacks):
        trainer.add_callback(callback)
    if begins and job.quantizes:
        rounded = trainer.evaluate()["eval_loss"]
        if run.first:
            write_atomically(run.folder / files.BEFORE, json_bytes({**before, "rounded": rounded}))
    return trainer


def _teacher(run: _Run, checkpoint: Checkpoint, student: PreTrainedModel) -> Teacher:
    """Who predicts: the checkpoint's model on the run's device, or what it predicted before, and itself for the rest.

    student: for its vocabulary, which must be the teacher's. Raises UsageError where it is not, or predictions are
    damaged; OutputError where they are another teacher's.
    """
    job, settings = run.job, run.job.settings
    dtype = torch.bfloat16 if settings.bf16 else torch.float32
    model = load(checkpoint.folder, dtype=dtype, device=run.args.device)
    check_vocabulary(student, model, checkpoint.folder)
    live = Live(model, settings.temperature)
    if job.predictions is None:
        return live
    rows = run.corpus.train.rows
    identity = {"teacher": checkpoint.fingerprint(), "text": rows.sha256, "temperature": settings.temperature,
                "bf16": settings.bf16}  # fmt: skip
    top = min(TOP, model.config.get_text_config().vocab_size)
    return Cached(live, job.predictions, rows=len(rows), length=settings.length, identity=identity, top=top)


def _prepare(run: _Run, net: PreTrainedModel) -> None:
    """Make `net`, in place, compute with weights as they would be stored; a float run leaves it as it is.

    Of a quantized model codes stay and scales train, or all of it trains from where it is. Raises UsageError for a rate
    of scales where none is learned, and what `prepare_qat` raises.
    """
    job = run.job
    if job.start.packed:
        rounding = QATConfig() if job.scales_only else job.rounding
        prepare_qat(net, job.recipe, config=rounding, weights=not job.scales_only)
    elif job.recipe is not None:
        train = run.corpus.train
        observed = [{"input_ids": train.rows.ids(train.numbers[:_OBSERVED].tolist())}] if job.recipe.is_static else ()
        prepare_qat(net, job.recipe, config=job.rounding, inputs=observed)
    if job.settings.scale_lr is not None and not scales(net):
        raise UsageError("no scale is learned here, so none has a rate", "leave scale_lr out")


def _trainer(run: _Run, net: PreTrainedModel, teacher: Teacher | None) -> FewBitsTrainer:
    """The Trainer of a prepared model, which is sharded if that was asked for."""
    settings = run.job.settings
    if settings.checkpointing:
        next(getattr(net, name) for name in _CHECKPOINTING if hasattr(net, name))()
    if settings.fsdp:  # before the optimizer is made, which holds on to parameters
        shard(net, run.args.device)
    kind = ShardedTrainer if settings.fsdp else FewBitsTrainer
    order = Order(run.corpus.train, settings.rows, settings.seed)
    trainer = kind(net, run.args, settings, order, run.corpus.held_out, teacher)
    trainer.remove_callback(PrinterCallback)  # it prints every line of the log
    return trainer


def _take_steps(run: _Run, trainer: FewBitsTrainer) -> None:
    """All steps that are left. Raises KeyboardInterrupt if the run was stopped, behind a checkpoint."""
    with hf.quiet():  # it draws a bar for each checkpoint
        trainer.train(resume_from_checkpoint=None if run.checkpoint is None else str(run.checkpoint))
    if any(isinstance(callback, Stopping) and callback.stopped for callback in trainer.callback_handler.callbacks):
        raise KeyboardInterrupt


def _finish(run: _Run, trainer: FewBitsTrainer, began: float) -> Trained:
    """Freeze the model, write the folder and measure it; by the first process, while the others only freeze.

    began: when the run did, in seconds. What is reported of the folder is measured on what was read back from it; only
    then does it get its name.
    """
    job = run.job
    before = read_json(run.folder / files.BEFORE) or {}
    last = trainer.last_metrics()
    losses = {f"loss_{when}": loss for when, loss in before.items()} | {"loss_trained": last["eval_loss"]}
    losses |= {"kl": last["eval_kl"]} if "eval_kl" in last else {}
    small = freeze(trainer.whole_model()) if job.quantizes else _float_result(run, trainer)
    nn.Module.to(small, dtype=getattr(torch, job.stored))  # scales are in it already, and stay as they are
    tokens = job.settings.tokens
    if run.first:
        shipped = run.folder / files.SHIPPED
        losses |= {"loss_shipped": run.loss_of(ship(small, job.start.tokenizer, shipped))}
        report = {**losses, "tokens": tokens, "identity": job.identity(run.args.world_size)}
        write_atomically(shipped / files.REPORT, json_bytes(report))
        shipped.replace(job.output)  # OUT is there now, and whole
        sync(job.output.parent)
    resumed_at = files.step_of(run.checkpoint)
    return Trained(job.output, tokens=tokens, seconds=time.time() - began, resumed_at=resumed_at, **losses)


def _float_result(run: _Run, trainer: FewBitsTrainer) -> nn.Module:
    """The float model, gathered if it was sharded."""
    if not isinstance(trainer, ShardedTrainer):
        return trainer.whole_model()
    model = run.job.start.model()
    model.load_state_dict(trainer.state_of_model(), strict=False)  # tied weights are there under one name
    return model
