"""`spicerack plan MODEL --fit 2x3090`: will it fit, in which numbers, and how fast will it be.

Nothing is read but headers, or a config.json alone. Without --fit it is this machine that is planned for, whose
bandwidth is measured, which needs torch; with it the answer is there in a fraction of a second.

What is shown fits 80 columns. Every figure is said to be exact, by a formula that was checked, or estimated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from spicerack.cli import _exact, _output
from spicerack.cli._commands import About
from spicerack.cli._output import size
from spicerack.errors import counted

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from spicerack.planning.engine import Engine
    from spicerack.planning.places import Share
    from spicerack.planning.plan import Plan, Remedy, Row
    from spicerack.planning.speed import Speed

ABOUT = About(place=15, summary="Will it fit, in which numbers, and how fast.")
_FEW = 0.0003
"""KL that is shown as none: of w8 on the model that losses were measured on, whose own noise in bfloat16 is .0002."""


@click.command()
@_output.model_argument
@click.option("--fit", metavar="DEVICES", help="2x3090, 'iPhone 16 Pro', 24GB ... Default: this machine, measured.")
@click.option("--context", type=click.IntRange(1, 1 << 30), help="Tokens of each user. Default: 8192, or the model's.")
@click.option("--users", type=click.IntRange(1, 4096), default=1, show_default=True, help="Sequences at once.")
@click.option("--engine", metavar="NAME", help="llama.cpp, vllm, transformers, onnxruntime, mlx or spicerack.")
@click.option(
    "--cache", type=int, default=16, show_default=True, metavar="16|8|4", help="Bits of keys and values of attention."
)
@click.option("--scheme", help="Plan these numbers only: w4g128, Q4_K_M ... Default: all that the engine has.")
@click.option("--ram", callback=_output.nbytes, metavar="SIZE", help="Memory beside the cards that may be used: 64GB.")
@click.option("--disk", is_flag=True, help="What fits nowhere may be read from the disk for each token.")
@click.option("--exact", is_flag=True, help="Ask llama.cpp, too, if it is installed: it counts, and reads no weight.")
@_output.json_option
def command(
    model: str, fit: str | None, context: int | None, users: int, engine: str | None, cache: int, scheme: str | None,
    ram: int | None, disk: bool, exact: bool, as_json: bool,
) -> None:  # fmt: skip
    """Will a model fit, in which numbers, and how fast will it be.

    MODEL is a folder in Hugging Face layout, a hub id, or a config.json alone; or one that is quantized already, a
    GGUF file too, which is planned as it is. Nothing is read but headers.

    \b
    spicerack plan MODEL --fit 2x3090 --context 8192
    spicerack plan MODEL --fit 2x3090 --engine vllm --users 4
    spicerack plan config.json --fit 'iPhone 16 Pro'
    """
    from spicerack.machine import catalogue
    from spicerack.planning import engine as engines
    from spicerack.planning.engine import Request
    from spicerack.planning.placement import Host
    from spicerack.planning.plan import Goal, context_of, default_engine, plan
    from spicerack.planning.written import open_any, reader, readers

    chosen = None if engine is None else engines.get(engine)
    devices, measured = (None, False) if fit is None else (catalogue.find(fit), False)
    opened, precision = open_any(model)
    among: tuple[Engine, ...] = ()
    if precision is not None:
        among = readers(opened, precision)
        chosen = None if engine is None else reader(opened, precision, engine)
    request = Request(context_of(opened, context), users, cache)
    if devices is None:
        from spicerack.planning import here

        devices, measured = here.devices()
    goal = Goal(devices, chosen or default_engine(opened, devices, among), request, Host(ram or 0, disk), measured)
    result = plan(opened, goal, scheme=scheme, among=among)
    counted = None
    if exact:
        from spicerack.planning.exact import count

        file = Path(model) if precision is not None and precision.stored == "gguf" else None
        counted = count.count(result, file, here=fit is None)
    if as_json:
        _output.emit(as_dict(result) | ({} if counted is None else {"exact": _exact.as_dict(counted)}))
    else:
        _show(result, _output.console())
        if counted is not None:
            _exact.show(counted, _output.console())


# ---- for people ------------------------------------------------------------------------------------------------------


def _show(plan: Plan, console: Console) -> None:
    """The model, where it shall run, a row for each precision, what is recommended or would help, lines to paste."""
    from rich.markup import escape

    for line in _heading(plan):
        console.print(escape(line), soft_wrap=True)
    console.print()
    console.print(_table(plan.rows))
    console.print()
    if plan.recommended is not None:
        _show_recommended(plan, plan.recommended, console)
    else:
        _show_remedies(plan, console)
    for line in plan.flags:
        console.print(f"    {line}", markup=False, soft_wrap=True)
    for line in _measured_lines(plan.rows):
        console.print(line, markup=False, soft_wrap=True)
    if any(row.loss > _FEW and row.precision.lost is None for row in plan.rows):
        console.print(
            "\nloss: KL in nats of plain rounding on a model of 4.5 M parameters; large models lose less,\n"
            "and calibration saves most of it: quantize --calib, then eval, say what yours lost.",
            soft_wrap=True,
        )


def _heading(plan: Plan) -> Iterator[str]:
    """What is planned, in two or three lines."""
    model, goal = plan.model, plan.goal
    experts = f", {model.chosen} of {model.experts} experts" if model.experts else ""
    read = f", {_count(model.read)} read per token{experts}" if model.generates else ""
    name = Path(model.name).name
    layers = counted(len(model.layers), "layer")
    yield f"{name} · {model.family} · {_count(model.parameters)} parameters{read} · {layers}"
    names = ", ".join(
        f"{count}x {name}" if count > 1 else name
        for name, count in Counter(device.name for device in goal.devices).items()
    )
    request = goal.request
    wide = f"a picture of {picture.height} x {picture.width}, " if (picture := model.picture) else ""
    users = "" if request.users == 1 else f", {request.users} {'at once' if picture else 'users'}"
    kept = f", cache in {request.cache_bits} bits" if model.generates else ""
    yield f"{names} · {goal.engine.name} · {wide}{counted(request.context, 'token')}{users}{kept}"
    if unsure := sorted({name for device in goal.devices for name in device.uncertain}):
        yield f"not confirmed of these devices: {', '.join(unsure)}"


def _table(rows: tuple[Row, ...]) -> Table:
    """A line for each precision: bits and file, what devices hold and have left, speed, loss."""
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for i, title in enumerate(("numbers", "bits", "weights", "in memory", "left", "tokens/s", "first token", "loss")):
        table.add_column(title, justify="left" if i == 0 else "right", no_wrap=i > 0, overflow="fold")
    for row in rows:
        spare = row.placement.spare
        left = size(spare) if spare >= 0 else f"[red]-{size(-spare)}[/red]"
        table.add_row(
            row.precision.name, f"{row.bits:.2f}", size(row.weights.file), size(row.placement.total), left,
            _output.rate(row.speed.decode) if row.speed else "-", _seconds(row.speed),
            f"{row.loss:.2g}" if row.loss > _FEW else "none",
        )  # fmt: skip
    return table


def _seconds(speed: Speed | None) -> str:
    """To the first token of a full prompt."""
    if speed is None or speed.first is None:
        return "-"
    low, high = speed.first
    if high < 0.1:
        return "< .1 s"
    return f"{low:.2g}-{high:.2g} s" if high < 100 else f"{low:.0f}-{high:.0f} s"


def _show_recommended(plan: Plan, row: Row, console: Console) -> None:
    """What is recommended, what each device then holds, and how fast that is."""
    from rich.markup import escape

    longest = "" if plan.longest is None else f"; it fits with up to {counted(plan.longest, 'token')}"
    console.print(f"Recommended: [bold]{escape(row.precision.name)}[/bold]{longest}", soft_wrap=True)
    for held, count in Counter(map(_held, row.placement.shares)).items():
        console.print(f"  {f'{count}x ' if count > 1 else ''}{held}", markup=False, soft_wrap=True)
    host = row.placement.host
    if host is not None and host.total:
        console.print(f"  {_held(host)}", markup=False, soft_wrap=True)
    for line in _speed_lines(row):
        console.print(line, markup=False, soft_wrap=True)


def _held(share: Share) -> str:
    """What a device holds: `RTX 3090, 41 layers: weights 22.1 GB exact, cache ...`."""
    parts = []
    for term in share.terms:
        about = f" +-{size(term.spread)}" if term.spread else ""
        parts.append(f"{term.name} {size(term.nbytes)} {term.how}{about}")
    layers = f", {counted(len(share.layers), 'layer')}" if share.layers else ""
    return f"{share.device.name}{layers}: {', '.join(p for p in parts if ' 0 B' not in p)}"


def _speed_lines(row: Row) -> Iterator[str]:
    """How fast, from what, and how often that is right."""
    if row.speed is None:
        yield f"no speed: {row.speechless}"
        return
    full = f", {_output.rate(row.speed.full)} with a full context" if row.speed.full < 0.99 * row.speed.decode else ""
    yield f"{_output.rate(row.speed.decode)} tokens/s{full}: {row.speed.basis}"


def _measured_lines(rows: Sequence[Row]) -> Iterator[str]:
    """What was measured of a folder that is there, with its interval."""
    for lost in (row.precision.lost for row in rows):
        if lost is None:
            continue
        unit = "KL in nats per token" if lost.metric == "kl" else "1 - cosine of embeddings"
        ends = "" if lost.ends is None else f" ({lost.ends[0]:.3g} to {lost.ends[1]:.3g}, 95 %)"
        text = f" of {Path(lost.text).name}" if lost.text else ""
        yield f"\nloss: {unit}, measured on this folder by {lost.by}:"
        yield f"{lost.mean:.3g}{ends} on {lost.tokens:,} tokens{text}"


def _show_remedies(plan: Plan, console: Console) -> None:
    """That nothing fits, by how much, and what would change it."""
    least = min(plan.rows, key=lambda row: row.weights.total)
    short = size(-least.placement.spare)
    console.print(f"Nothing fits: {least.precision.name} has the fewest bytes, and lacks {short}.", markup=False)
    if not plan.remedies:
        console.print("No change of cache, context, engine or number of devices that was tried makes it fit.")
        return
    console.print("It fits with, the smallest change first:")
    for remedy in plan.remedies:
        console.print(f"  {remedy.change}{_outcome(remedy)}", markup=False, soft_wrap=True)
    console.print("The first of them:")


def _outcome(remedy: Remedy) -> str:
    """What is then left, and how fast it is."""
    row = remedy.row
    speed = f", {_output.rate(row.speed.decode)} tokens/s" if row.speed else ""
    return f": {row.precision.name}, {size(row.placement.spare)} left{speed}"


def _count(number: int) -> str:
    """Parameters, as models are spoken of: `70.6 B`."""
    for unit, factor in (("T", 10**12), ("B", 10**9), ("M", 10**6)):
        if number >= factor:
            return f"{number / factor:.3g} {unit}"
    return f"{number:,}"


# ---- for programs ----------------------------------------------------------------------------------------------------


def as_dict(plan: Plan) -> dict[str, Any]:
    """The same as JSON's own types; sizes are bytes, times seconds."""
    model, goal = plan.model, plan.goal
    return {
        "model": model.name,
        "family": model.family,
        "parameters": model.parameters,
        "read_per_token": model.read,
        "active_parameters": model.active,
        "experts": model.experts,
        "experts_per_token": model.chosen if model.experts else 0,
        "layers": len(model.layers),
        "tied": model.tied,
        "devices": [device.name for device in goal.devices],
        "engine": goal.engine.name,
        "context": goal.request.context,
        "users": goal.request.users,
        "cache_bits": goal.request.cache_bits,
        "rows": [_row(row, goal.engine) for row in plan.rows],
        "recommended": None if plan.recommended is None else plan.recommended.precision.name,
        "longest_context": plan.longest,
        "remedies": [{"change": remedy.change, **_row(remedy.row, remedy.goal.engine)} for remedy in plan.remedies],
        "flags": list(plan.flags),
    }


def _row(row: Row, engine: Engine) -> dict[str, Any]:
    """One precision."""
    placement, speed = row.placement, row.speed
    return {
        "numbers": row.precision.name,
        "engine": engine.name,
        "scheme": row.precision.scheme,
        "bits_per_weight": row.bits,
        "weight_bytes": row.weights.file,
        "read_bytes_per_token": row.weights.read,
        "memory_bytes": placement.total,
        "budget_bytes": placement.budget,
        "spare_bytes": placement.spare,
        "fits": placement.fits,
        "expected_loss": row.loss,
        "measured_loss": None if row.precision.lost is None else row.precision.lost.as_dict(),
        "tokens_per_s": speed.decode if speed else None,
        "tokens_per_s_full": speed.full if speed else None,
        "prompt_tokens_per_s": list(speed.prompt) if speed and speed.prompt else None,
        "first_token_s": list(speed.first) if speed and speed.first else None,
        "speed_basis": speed.basis if speed else row.speechless,
        "tensor_parallel": placement.tensor,
        "pipeline_parallel": placement.pipeline,
        "experts_in_ram": placement.experts_in_ram,
        "disk_bytes": placement.disk,
        "devices": [_share(share) for share in placement.shares],
        "host": _share(placement.host) if placement.host is not None else None,
    }


def _share(share: Share) -> dict[str, Any]:
    """What a device holds."""
    return {
        "device": share.device.name,
        "layers": [share.layers[0], share.layers[-1]] if share.layers else [],
        "budget_bytes": share.budget,
        "terms": [
            {("bytes" if key == "nbytes" else key): value for key, value in asdict(term).items()}
            for term in share.terms
        ],
    }
