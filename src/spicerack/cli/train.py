"""`spicerack train MODEL -o OUT --scheme w2g32h --data TEXT`.

Options that say nothing are left to the defaults of `Settings` and `QATConfig`, which are the same in Python; those
that could have no effect are refused, because somebody meant something by them.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from spicerack.cli import _output, _rules
from spicerack.cli._commands import About
from spicerack.errors import UsageError, counted

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID
    from transformers import TrainerCallback, TrainerState

    from spicerack.quantization.recipe import Recipe, Rule
    from spicerack.training.callbacks import Watch
    from spicerack.training.job import TrainOptions
    from spicerack.training.run import Trained

ABOUT = About(place=30, summary="Train a model in few bits, or from scratch.", resumes=True)


@click.command(cls=_rules.OrderedCommand)
@click.argument("model", metavar="MODEL", required=False)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--scheme", help="Numbers of all linear layers: w4g32, w2g32h, ternary ... Default: as MODEL is.")
@click.option("--data", required=True, metavar="TEXT", help="Text to train on: file, JSON lines, folder, dataset.")
@click.option("--eval", "held_out", metavar="TEXT", help="Text to measure on. Default: 1 % of the data is held out.")
@click.option("--teacher", metavar="MODEL", help="Model whose predictions are learned: mostly MODEL itself.")
@click.option("--predictions", metavar="FOLDER", help="Keep the teacher's predictions there, for other runs too.")
@click.option("--kl", type=float, help="Share of the divergence from the teacher in the loss. Default: 0.5.")
@click.option("--temperature", type=float, help="Of both in it. Default: 1.")
@click.option("--steps", type=int, help="Steps of the optimizer. Default: 1000.")
@click.option("--batch", type=int, help="Sequences a step, over all processes. Default: 16.")
@click.option("--micro-batch", type=int, help="Sequences a process computes at once. Default: all of its share.")
@click.option("--length", type=int, help="Tokens of a sequence. Default: 512.")
@click.option("--lr", type=float, help="Highest learning rate. Default: 1e-4.")
@click.option("--embedding-lr", type=float, help="Of embeddings and heads. Default: --lr.")
@click.option("--scale-lr", type=float, help="Of learned scales. Default: --lr.")
@click.option("--schedule", metavar="NAME", help="cosine, linear, constant, two-stage (BitNet). Default: cosine.")
@click.option("--warmup", type=float, help="Share of the steps in which the rate rises. Default: 0.05.")
@click.option("--weight-decay", type=float, help="Of matrices. Default: 0.")
@click.option("--clip", type=float, help="Largest norm of the gradients. Default: 1.")
@click.option("--seed", type=int, help="Of the order of the text, and of random weights. Default: 0.")
@click.option("--quantizer", metavar="NAME", help="lsq, seq, absmax, absmean. Default: absmean for ternary, else lsq.")
@click.option("--init", metavar="NAME", help="Where learned scales begin: opt, absmax, lsq. Default: opt.")
@click.option("--ranges", metavar="NAME", help="Of static activations: lsq, ema. Default: lsq.")
@_rules.set_option
@_rules.skip_option
@click.option("--fit-groups", is_flag=True, help="Layers too narrow for the groups get the nearest scheme that fits.")
@click.option("--scales-only", is_flag=True, help="Of a quantized MODEL: no code changes.")
@click.option("--from-scratch", metavar="CONFIG", help="A config.json instead of MODEL: random weights.")
@click.option("--tokenizer", metavar="FOLDER", help="For --from-scratch. Default: beside the config.json.")
@click.option("--twin", metavar="bitnet|subln", help="Turn a Llama into BitNet's classes: more norms, relu^2.")
@click.option("--dtype", metavar="TYPE", help="What stays float is stored as: bfloat16, float16, float32.")
@click.option("--bf16", is_flag=True, help="Multiply matrices in bfloat16.")
@click.option("--checkpointing", is_flag=True, help="Compute blocks twice instead of keeping what they need.")
@click.option("--fsdp", is_flag=True, help="Shard parameters over the processes of torchrun (FSDP2).")
@click.option("--cpu", is_flag=True, help="Train on the CPU even if there is a GPU.")
@click.option("--eval-every", type=int, help="Steps. Default: 100.")
@click.option("--save-every", type=int, help="Steps between checkpoints. Default: 100.")
@click.option("--log-every", type=int, help="Steps. Default: 10.")
@_output.json_option
def command(
    model: str | None,
    output: Path,
    set_: tuple[str, ...],
    skip: tuple[str, ...],
    from_scratch: str | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Train a model in few bits, and write it as it was trained.

    MODEL is a folder in Hugging Face layout (safetensors) or a hub id; a quantized one trains on. Checkpoints and
    curves lie in OUT.training; the same command continues there. Several processes: torchrun --nproc-per-node 2 -m
    spicerack train ...

    \b
    spicerack train MODEL -o out --scheme w2g32h --data text.jsonl --teacher MODEL --steps 2000
    spicerack train --from-scratch config.json --tokenizer MODEL -o out --scheme ternarya8 --data corpus/
    tensorboard --logdir out.training/logs
    """
    source = _source(model, from_scratch)
    rules = _rules.of(click.get_current_context(), set_, skip)
    renamed = _rules.renamed((given["scheme"], *set_))
    given["scheme"] = _recipe(given["scheme"], given.pop("fit_groups"))
    _refuse_early(source, given, rules)
    # torch comes in here, and not at the top: --help needs none of it, and what is wrong above is said at once
    from spicerack.machine.ranks import launched
    from spicerack.training.run import execute

    options = _options(rules, given)
    first = launched().first  # of torchrun's processes one speaks for all
    with _bar(first) as bar, _output.interruptible(bar.console, "this step") as stopping:
        for note in renamed if first else ():
            bar.console.print(note, soft_wrap=True, markup=False)
        trained = execute(source, output, options, _watch(bar, options.settings.steps, stopping, first))
    if first and as_json:
        _output.emit({**asdict(trained), "output": str(output)})
    elif first:
        _report(trained, source, _output.console())


def _source(model: str | None, from_scratch: str | None) -> str:
    """The one of both that was given: a model, or a config.json to begin from with random weights.

    Raises UsageError for both, for none, and for a folder where a config.json should be.
    """
    if (model is None) == (from_scratch is None):
        raise UsageError("give either MODEL or --from-scratch CONFIG", "spicerack train --help")
    if from_scratch is not None and not from_scratch.endswith(".json"):
        raise UsageError(f"--from-scratch {from_scratch} is no config.json", "give the file, not its folder")
    return model or from_scratch or ""


def _recipe(scheme: str | None, fit_groups: bool) -> Recipe | None:
    """The scheme as a recipe, which says whether narrow layers get what fits them; None without a scheme.

    Raises SchemeError for one that there is not, UsageError for narrow layers without any.
    """
    from spicerack.quantization import recipe

    if scheme is None and fit_groups:
        raise UsageError("--fit-groups is about a scheme, and there is none", "name one, or leave it out")
    return None if scheme is None else recipe.of(scheme).with_choices(None, None, None, fit_groups)


def _refuse_early(source: str, given: dict[str, Any], rules: list[Rule]) -> None:
    """Raise what headers tell, before torch is there and the text is read: models that are none, layers too narrow.

    source: of `_source`. given: click's parameters by name, the recipe under that of its scheme. rules: of --set and
    --skip.
    """
    from spicerack.models.opening import open_stored
    from spicerack.models.overview import quantized_with
    from spicerack.quantization import early

    for model in (source, given["teacher"]):
        if model is not None and not model.endswith(".json"):
            checkpoint = open_stored(model)
            if model == source and given["scheme"] is not None and quantized_with(checkpoint.config) is None:
                early.refuse_shapes(checkpoint, given["scheme"].then(rules))


def _options(rules: list[Rule], given: dict[str, Any]) -> TrainOptions:
    """What is asked for, of the options that were typed.

    rules: of --set and --skip, in their order. given: click's parameters by name, None for what was not typed. Those
    that are fields of `Settings`, `QATConfig` or `TrainOptions` go there, by their names. Raises UsageError for those
    that could have no effect, and for numbers that make no sense.
    """
    from spicerack.training.job import TrainOptions
    from spicerack.training.qat.start import QATConfig
    from spicerack.training.settings import Settings

    config = QATConfig(**_given(given, QATConfig))
    settings = Settings(**_given(given, Settings))
    options = TrainOptions(**_given(given, TrainOptions), rules=rules, config=config, settings=settings)
    if options.scheme is None and rules:
        raise UsageError("--set and --skip change a scheme, and there is none", "name one, or leave them out")
    if options.teacher is None and any(given[name] is not None for name in ("kl", "temperature")):
        raise UsageError("--kl and --temperature are about a teacher, and there is none", "name one by --teacher")
    return options


def _given(options: dict[str, Any], kind: type) -> dict[str, Any]:
    """Those of the fields of the dataclass `kind` that were given on the command line, name -> value.

    options: click's parameters, None for what was not typed. 0 is given; a flag that is not set is not, so that the
    dataclass's own default holds.
    """
    names = {field.name for field in fields(kind)}
    return {
        name: value for name, value in options.items() if name in names and value is not None and value is not False
    }


@contextmanager
def _bar(first: bool) -> Iterator[Progress]:
    """Steps done and left, on standard error; of several processes the first one shows them, the others say nothing."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"), BarColumn(bar_width=16), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    place = _output.console(as_json=True)
    with Progress(*columns, console=place, transient=True, disable=not first or not place.is_terminal) as bar:
        yield bar


def _watch(bar: Progress, steps: int, stopping: Callable[[], bool], first: bool) -> Watch:
    """Who looks on: the bar, of `steps` steps, and above it lines; those of a step are printed by the first process."""
    from spicerack.training.callbacks import Watch

    task = bar.add_task("reading and measuring", total=steps)  # the text is packed, and the float model measured
    return Watch(
        notify=lambda note: bar.console.print(note, soft_wrap=True, markup=False),
        stopping=stopping,
        callbacks=(_lines(bar, task),) if first else (),
    )


def _lines(bar: Progress, task: TaskID) -> TrainerCallback:
    """Moves the bar, and prints a line for each evaluation and each checkpoint."""
    from transformers import TrainerCallback

    class Lines(TrainerCallback):
        """What people see of a run. loss: the last one that was logged, NaN before there is one."""

        loss = float("nan")

        # the Trainer calls these by keyword, with more than they need

        def on_train_begin(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
            bar.update(task, description="training", completed=state.global_step)

        def on_step_end(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
            bar.update(task, completed=state.global_step)

        def on_train_end(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
            bar.update(task, description="writing and measuring")

        def on_log(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
            logs = kwargs["logs"]
            if isinstance(logs, dict) and "loss" in logs:
                self.loss = logs["loss"]
                bar.update(task, description=f"loss {self.loss:.4f}")

        def on_evaluate(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
            metrics = kwargs["metrics"]
            assert isinstance(metrics, dict)
            kl = f", KL from the teacher {metrics['eval_kl']:.4f}" if "eval_kl" in metrics else ""
            trained = "" if math.isnan(self.loss) else f"training loss {self.loss:.4f}, "
            bar.console.print(
                f"step {state.global_step}: {trained}held-out loss {metrics['eval_loss']:.4f}{kl}",
                soft_wrap=True, highlight=False,
            )  # fmt: skip

        def on_save(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
            bar.console.print(f"step {state.global_step}: checkpoint", soft_wrap=True, highlight=False)

    return Lines()


def _report(trained: Trained, source: str, console: Console) -> None:
    """The four losses in nats a token, how far it came, and what to do next.

    trained: what came out; a figure that it has not (a float run, no teacher) has no row. source: what it was trained
    from, for the command that compares the two; a config.json has no float model to compare with.
    """
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("held-out loss")
    table.add_column("nats a token", justify="right")
    for name, value in (
        ("float", trained.loss_float),
        ("rounded, before training", trained.loss_rounded),
        ("trained", trained.loss_trained),
        ("as stored, read back", trained.loss_shipped),
        ("KL from the teacher", trained.kl),
    ):
        if value is not None:
            table.add_row(name, f"{value:.4f}")
    console.print(table)
    out = trained.output
    if trained.already_there:
        console.print(f"\n{out} is already there, from the same command", soft_wrap=True, markup=False)
        return
    resumed = f", continued at step {trained.resumed_at}" if trained.resumed_at else ""
    console.print(f"\n{counted(trained.tokens, 'token')}, {trained.seconds:.1f} s{resumed}", highlight=False)
    console.print(f"{out} is ready; {out}.training has checkpoints and curves, and may go", soft_wrap=True)
    if (original := _original(source)) is not None:
        line = shlex.join(["spicerack", "eval", str(out), "--against", original, "--text", "FILE"])
        console.print(f"next: {line}", soft_wrap=True, markup=False)


def _original(source: str) -> str | None:
    """The float model that one is compared with which was trained from `source`; None where that began at random, or
    is quantized itself, whose float model nobody named."""
    if source.endswith(".json"):
        return None
    from spicerack.models.opening import open_stored
    from spicerack.models.overview import quantized_with

    return source if quantized_with(open_stored(source).config) is None else None
