"""`spicerack quantize MODEL -o OUT --scheme w4g128`.

The stages, each of which can refuse before the next costs anything: what was typed becomes a `Recipe`; `prepare` reads
headers and decides about every tensor; `_calibration` tokenizes the text, if there is one; `plan` finds out what will
be in memory; --dry-run ends here; `execute` writes the folder. Under torchrun every process goes this way, and the
first one speaks.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from spicerack import plugins
from spicerack.cli import _budget, _fit, _output, _rules
from spicerack.cli._commands import About
from spicerack.errors import RecipeError, UsageError

if TYPE_CHECKING:
    from spicerack.planning.sensitivity import Budget
    from spicerack.quantization.job import Job
    from spicerack.quantization.memory import MemoryPlan
    from spicerack.quantization.recipe import Recipe, Rule
    from spicerack.quantization.stream import Means
    from spicerack.text.calibration import Calibration

ABOUT = About(place=20, summary="Turn a model folder into a smaller one that runs.", resumes=True)
_LENGTH = 512
"""Tokens of a calibration sequence by default; a model with fewer positions gets as many as it has."""


def _names(folder: str) -> str:
    """Names of the plug-ins of a folder, for help."""
    return ", ".join(plugins.names(folder))


def _engines() -> str:
    """Names of engines, for help: those of files, of which none is imported."""
    return ", ".join(name.replace("llama_cpp", "llama.cpp") for name in plugins.names("storage.engines"))


@dataclass(frozen=True, slots=True)
class _Options:
    """What was typed, option by option, under the names of click's parameters.

    model                   folder, or hub id
    output                  folder to write
    scheme, range_, method, observer   over those of `recipe_file`; None leaves them to it, or to the defaults
    effort                  what may be spent on codes where no method is named
    calib                   text to run the model on, "none" for text that it makes itself; None: no calibration
    samples, length, seed   how many sequences of it, their tokens (None: `_LENGTH`), which ones
    device                  where blocks compute while they are calibrated
    recipe_file             YAML with a scheme and rules
    fit_groups              narrow layers get what fits them, and are not refused
    for_                    engine that must compute all of it exactly
    set_, skip              rules, each option's own; their order is in the context
    threads                 of the CPU; None: one per core
    shard_bytes             the largest file to write
    memory                  bytes that must not be exceeded; None: no limit
    fit, context, engine    devices, tokens and program that the scheme is chosen for; no `fit`: it is named
    size, bits, max_kl, max_loss   a budget that a mix of schemes is chosen for; at most one
    no_check                leave out the evaluation behind the run
    dry_run, as_json        show what would be done; print one JSON object
    """

    model: str
    output: Path
    scheme: str | None
    range_: str | None
    method: str | None
    observer: str | None
    effort: str
    calib: str | None
    samples: int
    length: int | None
    seed: int
    device: str
    recipe_file: Path | None
    set_: tuple[str, ...]
    skip: tuple[str, ...]
    fit_groups: bool
    for_: str | None
    threads: int | None
    shard_bytes: int
    memory: int | None
    fit: str | None
    context: int | None
    engine: str | None
    size: str | None
    bits: float | None
    max_kl: float | None
    max_loss: str | None
    no_check: bool
    dry_run: bool
    as_json: bool

    def recipe(self, rules: list[Rule]) -> Recipe:
        """The recipe's file with what was typed over it, and `rules`, of --set and --skip, behind the file's own.

        `--method auto` undoes the file's method: the choice is then made by scheme and text. Raises RecipeError where
        there is neither a file nor a scheme, and for what cannot be combined; SchemeError for a scheme that there is
        not.
        """
        from spicerack.numerics.scheme import parse
        from spicerack.quantization import recipe
        from spicerack.storage import engine as engines

        if self.recipe_file is not None:
            chosen = recipe.read(self.recipe_file)
            chosen = chosen if self.scheme is None else dataclasses.replace(chosen, scheme=parse(self.scheme))
        elif self.scheme is not None:
            chosen = recipe.Recipe(parse(self.scheme))
        else:
            usual = () if self.for_ is None else engines.find(self.for_).usual
            hint = f"usual for {self.for_}: --scheme {', '.join(usual)}" if usual else "for example --scheme w4g128"
            raise RecipeError("neither --scheme nor --recipe is given", hint)
        if self.method == "auto":
            chosen = dataclasses.replace(chosen, method=None)
        method = None if self.method == "auto" else self.method
        return chosen.with_choices(self.range_, method, self.observer, self.fit_groups or None, self.for_).then(rules)


@click.command(cls=_rules.OrderedCommand)
@_output.model_argument
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--scheme", help="Numbers of all linear layers: w8, w4g128, w4g32z, w2g32h, nf4 ...")
@click.option("--range", "range_", metavar="opt|absmax", help="How scales are chosen. Default: opt, the least error.")
@click.option(
    "--method",
    metavar="CHAIN",
    help=f"How codes are chosen: {_names('algorithms.solvers')}, or transforms before one: awq+gptq. Default: auto.",
)
@click.option(
    "--observer",
    metavar="NAME",
    help=f"How static scales (a8s) are found: {_names('quantization.calibration.observers')}. Default: percentile.",
)
@click.option(
    "--effort",
    metavar="normal|high",
    default="normal",
    help="high: learn codes below four bits, in ten times the time.",
)
@click.option("--calib", metavar="TEXT", help="Text to run the model on: file, folder, dataset; none: its own.")
@click.option("--samples", type=click.IntRange(1), default=128, show_default=True, help="Sequences of it.")
@click.option("--length", type=click.IntRange(2), help="Tokens of a sequence. Default: 512, or the model's longest.")
@click.option("--seed", type=int, default=0, show_default=True, help="Which sequences.")
@click.option("--device", default="cpu", show_default=True, help="Where blocks compute with --calib: cpu, cuda ...")
@click.option("--recipe", "recipe_file", type=click.Path(path_type=Path), help="YAML file with scheme and rules.")
@_rules.set_option
@_rules.skip_option
@click.option("--fit-groups", is_flag=True, help="Layers too narrow for the groups get the nearest scheme that fits.")
@click.option("--for", "for_", metavar="ENGINE", help=f"Only what it computes exactly: {_engines()}.")
@click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads. Default: one per core.")
@click.option(
    "--shard-size",
    "shard_bytes",
    callback=_output.nbytes,
    default="2GB",
    show_default=True,
    help="Largest output file.",
)
@click.option(
    "--memory", callback=_output.nbytes, metavar="SIZE", help="Most that may be used: 8GB ... Default: no limit."
)
@click.option("--fit", metavar="DEVICES", help="In place of --scheme: what plan recommends for 2x3090, 24GB ...")
@click.option("--context", type=click.IntRange(1), help="With --fit: tokens. Default: 8192, or the model's.")
@click.option("--engine", metavar="NAME", help="With --fit: llama.cpp, vllm, spicerack ... Default: plan's.")
@_budget.options
@click.option("--no-check", is_flag=True, help="Do not measure, in a tenth of the time, what was lost.")
@click.option("--dry-run", is_flag=True, help="Show what would be done; write nothing.")
@_output.json_option
@click.pass_context
def command(ctx: click.Context, /, **given: Any) -> None:
    """Turn a model folder into a smaller one that runs.

    MODEL is a folder in Hugging Face layout (safetensors) or a hub id. Rules match checkpoint names without `.weight`;
    `*` stays within one component, `**` crosses; later rules win.

    \b
    spicerack quantize MODEL -o out --scheme w4g128
    spicerack quantize MODEL -o out --scheme w4g32z --set '**.down_proj=w8' --skip 'model.layers.0.**'
    spicerack quantize MODEL -o out --scheme w3g64 --calib text.jsonl
    spicerack quantize MODEL -o out --fit 2x3090 --context 8192 --engine vllm
    spicerack quantize MODEL -o out --bits 3.5 --calib text.jsonl
    """
    options = _Options(**given)
    _check_calibration_options(ctx, options)
    budget = _budget.of(options)
    if budget is not None:
        _with_budget(options, budget, _rules.of(ctx, options.set_, options.skip))
        return
    fitted = _fit.of(options)
    if fitted is not None:
        options = dataclasses.replace(options, scheme=fitted.scheme, fit_groups=True, for_=fitted.for_)
    from spicerack.quantization import early
    from spicerack.quantization.recipe import decided

    rules = [*(() if fitted is None else fitted.rules), *_rules.of(ctx, options.set_, options.skip)]
    renamed = _rules.renamed((options.scheme, *options.set_))  # which must be schemes; a method may bring torch in
    source = early.open_float(options.model)
    recipe = options.recipe(rules)
    with_text = options.calib is not None
    if recipe.for_ is None:  # an engine has its own fallbacks
        early.refuse_shapes(source, recipe)
    whole = decided(recipe, with_text, options.effort)
    # torch comes in here, and not at the top: --help needs none of it, and what is wrong above is said at once
    from spicerack.cli import _quantizing
    from spicerack.quantization.job import prepare
    from spicerack.quantization.run import check_written, execute, notes
    from spicerack.quantization.stream import plan
    from spicerack.storage.files import local

    means = _means(options)
    ranks = means.ranks
    console = _output.console(options.as_json or not ranks.first)
    console.quiet = not ranks.first
    job = prepare(options.model, whole, with_text=with_text, shard_bytes=options.shard_bytes)
    if fitted is not None:
        fitted.check(job.sizes().bytes_after)
    calibration = None if options.calib is None else _calibration(job, options.calib, options)
    planned = plan(job, calibration, options.memory)
    told = (*([fitted.because] if fitted else ()), *renamed, *notes(job, calibration, recipe, options.effort))
    _quantizing.announce(job, calibration, planned, means.device, console, told)
    if options.dry_run:
        _quantizing.foretell(job, console)
        if options.as_json:
            _output.emit(_dry_run(job, planned, told))
        return
    unit = "this block" if calibration is not None else None
    with _quantizing.bar(ranks) as bar, _output.interruptible(bar.console, unit) as stopping:
        watch = _quantizing.watching(bar, job, stopping, ranks, calibrated=calibration is not None)
        summary = execute(job, local(options.output), calibration=calibration, means=means, watch=watch, notes=told)
    if summary is None:
        return
    if not options.as_json:
        _quantizing.report(summary, console)
    if not options.no_check:
        with _output.measuring() as progress:
            summary = check_written(summary, job, calibration, means, progress)
    if options.as_json:
        _output.emit(summary.as_dict())
    else:
        _quantizing.conclude(summary, job.source.folder, console)


def _with_budget(options: _Options, budget: Budget, rules: list[Rule]) -> None:
    """What --size, --bits, --max-kl and --max-loss do: a mix of schemes is searched for, and written."""
    from spicerack.quantization import early

    early.open_float(options.model)
    recipe = dataclasses.replace(options, scheme=_budget.PLAIN).recipe(rules)
    from spicerack.planning.mix import judge, units
    from spicerack.planning.mix.order import Order, prepare
    from spicerack.quantization import job as jobs
    from spicerack.quantization.recipe import decided
    from spicerack.storage.files import local

    listing = decided(units.listing(recipe), True)
    job = jobs.prepare(options.model, listing, with_text=True, shard_bytes=options.shard_bytes)
    asked = dataclasses.replace(options, samples=judge.with_held_out(options.samples, job.source.folder))
    text = _calibration(job, _budget.text_of(options), asked)
    output = local(options.output)
    order = Order(options.model, output, budget, recipe, options.effort, text, _means(options), options.shard_bytes)
    _budget.run(prepare(order), dry_run=options.dry_run, as_json=options.as_json)


def _check_calibration_options(ctx: click.Context, options: _Options) -> None:
    """Raises UsageError for an option about calibration text that was typed, where there is none."""
    for name in ("samples", "length", "seed", "device"):
        if options.calib is None and ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise UsageError(f"--{name} is about calibration text, and there is none", "pass --calib TEXT")


def _dry_run(job: Job, planned: MemoryPlan, notes: tuple[str, ...]) -> dict[str, Any]:
    """What --dry-run --json prints: the sizes that the folder would have, by kind of layer, too, the memory that the
    run would take, and the notes."""
    from spicerack.storage import ledger

    layers = [dataclasses.asdict(row) for row in ledger.by_layer_type(action.entry() for action in job.actions)]
    return {
        "dry_run": True,
        **dataclasses.asdict(job.sizes()),
        "planned_peak_bytes": planned.peak_bytes,
        "format": job.format.name,
        "layers": layers,
        "notes": list(notes),
    }


def _means(options: _Options) -> Means:
    """What the run may use: the device, threads and memory as typed, among other processes, if torchrun started this.

    Under torchrun --device is "cpu" or "cuda"; each process then has the GPU of its own number. That torchrun started
    it is told by a variable that nobody else sets. Raises UsageError for a device that torch cannot compute on.
    """
    from spicerack.machine import devices
    from spicerack.machine.ranks import ALONE, join
    from spicerack.quantization.stream import Means

    device = options.device
    launched = "TORCHELASTIC_RUN_ID" in os.environ
    where = devices.find(devices.of_rank(device, int(os.environ["LOCAL_RANK"])) if launched else device)
    ranks = join(where) if launched else ALONE
    return Means(where, options.threads, options.memory, ranks)


def _calibration(job: Job, source: str, options: _Options) -> Calibration:
    """The text that --calib names, as tokens of the job's model.

    job: of the float model, whose tokenizer, kind and number of positions count. source: a file, a folder, a data set,
    or "none" for text that the model makes itself, for which it is loaded. options: how many sequences, of how many
    tokens, and which. Raises UsageError for sequences longer than the model's positions, TextError, CheckpointError.
    """
    from spicerack.models.inputs import limits_of
    from spicerack.models.kind import kind_of
    from spicerack.runtime import hf
    from spicerack.runtime.load import load
    from spicerack.text import calibration, generated
    from spicerack.text.tokenizer import read_tokenizer

    folder = job.source.folder
    config, _ = hf.config_and_class(job.source.config, folder)
    tokenizer = read_tokenizer(folder, config)
    kind = kind_of(job.source.config, folder)
    given = limits_of(job.source.config, config)
    if options.length is not None:
        given.check_length(options.length, "--length")
    length = options.length or min(_LENGTH, given.positions or _LENGTH)
    samples, seed = options.samples, options.seed
    if source == "none":
        return generated.from_model(load(folder), tokenizer, samples=samples, length=length, seed=seed)
    return calibration.read(source, tokenizer, samples=samples, length=length, seed=seed, kind=kind)
