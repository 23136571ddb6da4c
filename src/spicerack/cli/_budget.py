"""`spicerack quantize` with a budget in place of a scheme: --size, --bits, --max-kl, --max-loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import click

from spicerack.cli import _fit, _output
from spicerack.errors import UsageError, counted

if TYPE_CHECKING:
    from rich.console import Console

    from spicerack.planning.mix.order import Prepared
    from spicerack.planning.mix.run import Outcome
    from spicerack.planning.sensitivity import Budget
    from spicerack.quantization.watch import Watch

PLAIN = "w8"
"""A scheme for the recipe that holds a person's rules and method: which one it is does not matter."""
_Command = TypeVar("_Command", bound=Callable[..., Any])


class Typed(_fit.Choices, Protocol):
    """What was typed, as far as budgets go by it: the options of these names."""

    @property
    def size(self) -> str | None: ...
    @property
    def bits(self) -> float | None: ...
    @property
    def max_kl(self) -> float | None: ...
    @property
    def max_loss(self) -> str | None: ...
    @property
    def observer(self) -> str | None: ...
    @property
    def no_check(self) -> bool: ...
    @property
    def calib(self) -> str | None: ...


def options(command: _Command) -> _Command:
    """The four options, for a command."""
    for option in (
        click.option(
            "--max-loss", metavar="SHARE", help="The same: perplexity 1% higher at most; encoders: 1 - cosine."
        ),
        click.option("--max-kl", type=float, metavar="NATS", help="The same: the smallest that loses no more: 0.01."),
        click.option("--bits", type=float, help="The same: bits of a weight, scales counted."),
        click.option("--size", help="In place of --scheme: the best mix of schemes of 4.2GB. With --calib."),
    ):
        command = option(command)
    return command


def of(typed: Typed) -> Budget | None:
    """The budget that was typed; None without one.

    Raises UsageError for two at once, for what leaves no choice, and where there is no text to measure losses on.
    """
    from spicerack.planning.budget import budget_of

    budget = budget_of(typed.size, typed.bits, typed.max_kl, typed.max_loss)
    if budget is None:
        return None
    name = f"--{budget.kind.replace('_', '-')}"
    for other, value in (("--scheme", typed.scheme), ("--recipe", typed.recipe_file), ("--fit", typed.fit)):
        if value is not None:
            raise UsageError(
                f"{name} chooses schemes, and {other} does, too",
                f"leave one of them out; --set 'PATTERN=SCHEME' fixes some layers beside {name}",
            )
    if typed.observer is not None:
        raise UsageError(f"--observer is about static activations, which {name} does not choose", "leave it out")
    if typed.no_check:
        raise UsageError(f"--no-check: {name} measures what it writes, and chooses by that", "leave it out")
    text_of(typed)
    return budget


def text_of(typed: Typed) -> str:
    """The text that was typed. Raises UsageError for none."""
    if typed.calib is None:
        raise UsageError("a budget needs text to measure losses on, and there is none", "pass --calib TEXT")
    return typed.calib


def run(prepared: Prepared, *, dry_run: bool, as_json: bool) -> None:
    """Say what will be done, search, and say what came out; with `dry_run` only the first."""
    from spicerack.cli import _quantizing
    from spicerack.planning.mix import run as mixing
    from spicerack.quantization.watch import Watch, Working

    console = _output.console(as_json)
    _announce(prepared, console)
    if dry_run:
        _foretell(prepared, console, as_json=as_json)
        return

    def watching(stopping: Callable[[], bool], report: Callable[[str, float], None]) -> Watch:
        class Watching(Watch):
            def working(self, at: Working) -> None:
                report(at.doing, (at.number + at.share) / at.count)

            def stopping(self) -> bool:
                return stopping()

        return Watching()

    def tell(sentence: str) -> None:
        console.print(sentence, soft_wrap=True, markup=False)

    with _output.measuring() as report, _output.interruptible(console, "this block") as stopping:
        outcome = mixing.run(prepared, watching(stopping, report), tell)
    if as_json:
        _output.emit(outcome.as_dict())
        return
    console.print()
    _quantizing.report(outcome.summary, console)
    _report(outcome, console)
    _quantizing.conclude(outcome.summary, prepared.listing.source.folder, console)


def _announce(prepared: Prepared, console: Console) -> None:
    """Model, budget, text, units and their schemes, notes."""
    from rich.markup import escape

    from spicerack.planning.budget import told

    order, units = prepared.order, prepared.choices.units
    names = list(dict.fromkeys(scheme.name for unit in units for scheme in unit.schemes))
    count, length = prepared.text.ids.shape
    for title, line in (
        ("model", str(prepared.listing.source.folder)), ("budget", told(order.budget)),
        ("method", f"{prepared.method}, range={prepared.listing.recipe.range_}"),
        ("calib", f"{prepared.text.source}, {counted(count, 'sequence')} of up to {counted(length, 'token')}"),
        ("units", f"{len(units)}, each in one of {', '.join(names)}"),
    ):  # fmt: skip
        console.print(f"[bold]{title:6}[/bold] {escape(line)}", soft_wrap=True)
    for note in prepared.notes:
        console.print(f"[yellow]note[/yellow]   {escape(note)}", soft_wrap=True)
    console.print()


def _foretell(prepared: Prepared, console: Console, *, as_json: bool) -> None:
    """The smallest and the largest mix, which is all that is known before anything is measured."""
    ends = [
        prepared.sizes({unit.name: unit.schemes[place].name for unit in prepared.choices.units}) for place in (0, -1)
    ]
    for name, sizes in zip(("smallest", "largest"), ends, strict=True):
        size = _output.size(sizes.files)
        console.print(f"{name:8} mix {size}, {sizes.files:,} bytes of weights, {sizes.bits:.2f} bits a weight")
    console.print("nothing was written: this was a dry run")
    if as_json:
        units = [
            {"name": unit.name, "weights": unit.weights, "schemes": [scheme.name for scheme in unit.schemes]}
            for unit in prepared.choices.units
        ]
        record = [{"nbytes": sizes.files, "bits": sizes.bits} for sizes in ends]
        _output.emit({
            "dry_run": True, "smallest": record[0], "largest": record[1], "units": units, "notes": list(prepared.notes),
        })  # fmt: skip


def _report(outcome: Outcome, console: Console) -> None:
    """What was asked for, expected and measured, in a line."""
    from spicerack.planning.budget import told

    known = outcome.known
    assert known.budget is not None, "searched for"
    last = known.rounds[-1]
    unit = "KL in nats per token" if known.metric == "kl" else "1 - cosine"
    rise = "" if last.rise is None else f"; perplexity {last.rise[0]:+.2%} ({last.rise[1]:+.2%} to {last.rise[2]:+.2%})"
    rounds = counted(len(known.rounds), "round")
    console.print(
        f"budget {told(known.budget)}: {last.bits:.3f} bits a weight; {unit} {last.measured:.4g} "
        f"({last.interval[0]:.4g} to {last.interval[1]:.4g}) on {last.tokens:,} held-out tokens, expected "
        f"{last.predicted:.4g}{rise}; {rounds}",
        soft_wrap=True,
        markup=False,
    )
