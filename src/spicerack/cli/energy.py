"""`spicerack energy OUT`: joules per token, measured where this machine has a meter, else estimated, which is said."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from spicerack.cli import _output
from spicerack.cli._commands import About
from spicerack.errors import counted

if TYPE_CHECKING:
    from collections.abc import Callable

    from spicerack.machine.energy import Counter

ABOUT = About(place=55, summary="Joules per token: measured, or estimated and labelled so.")
_BATTERY = 54_000
"""Joules in the battery of a phone: 15 Wh."""


@click.command()
@click.argument("out", metavar="OUT")
@click.option("--seconds", type=_output.Number(1, 3600), default=30.0, show_default=True, help="How long to measure.")
@click.option("--device", default="cpu", show_default=True, help="Where the model runs: cpu, cuda ...")
@_output.engine_option
@click.option("--fit", metavar="DEVICE", help="Estimate for another device: 3090, 'iPhone 16 Pro' ...")
@click.option("--watts", type=_output.Number(0.01, 1e5), help="What the device takes under load, for the estimate.")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that came with the model.")
@_output.json_option
def command(
    out: str, seconds: float, device: str, engine: str | None, fit: str | None, watts: float | None,
    trust_remote_code: bool, as_json: bool,
) -> None:  # fmt: skip
    """Joules that the quantized folder OUT takes for a token.

    Measured with RAPL (processor packages and DRAM) and, on cuda with pynvml installed, the cards' own counters; idle
    power, measured just before, is subtracted. Where no meter can be read, estimated from the bytes and operations of a
    token and the device's power.

    \b
    spicerack energy out
    spicerack energy out --fit 3090
    """
    from spicerack.models.opening import open_stored
    from spicerack.storage import records

    folder = open_stored(out).folder
    meters, reason = ((), f"{fit} is another device") if fit is not None else _meters(device)
    if meters:
        from spicerack.evaluation.energy import EnergyOptions, measure

        options = EnergyOptions(seconds=seconds, device=device, engine=engine, trust_remote_code=trust_remote_code)
        with _output.measuring() as progress:
            result = measure(out, meters, options=options, progress=progress).as_dict()
    else:
        result = {**_estimated(out, fit, watts), "not_measured": reason}
    records.keep(folder, "energy", result)
    if as_json:
        _output.emit(result)
    else:
        _show(result)


def _meters(device: str) -> tuple[tuple[Counter, ...], str | None]:
    """What counts here, and why RAPL does not."""
    from spicerack.machine import energy

    cards = energy.nvml() if device.startswith("cuda") else ()
    reason = energy.rapl_obstacle()
    if device.startswith("cuda") and not cards:
        return (), "the cards' counters cannot be read: pip install nvidia-ml-py, for cards of Volta and later"
    counters = (*energy.rapl(), *cards) if reason is None else cards
    still = energy.standing_still(counters) if counters else None
    return ((), still) if still is not None else (counters, reason)


def _estimated(out: str, fit: str | None, watts: float | None) -> dict[str, Any]:
    """By planning's model of speed, and power."""
    from spicerack.machine import catalogue
    from spicerack.planning import energy
    from spicerack.planning.engine import Request
    from spicerack.planning.plan import Goal, context_of, default_engine
    from spicerack.planning.written import open_written

    model, precision = open_written(out)
    if fit is None:
        from spicerack.planning import here

        devices, measured = here.devices()
    else:
        devices, measured = catalogue.find(fit), False
    goal = Goal(devices, default_engine(model, devices), Request(context_of(model, 1), 1, 16), measured=measured)
    return energy.estimate(model, precision, goal, watts).as_dict()


def _show(result: dict[str, Any]) -> None:
    """The figure first, with its label; then what it is made of."""

    def say(line: str) -> None:
        _output.console().print(line, markup=False, soft_wrap=True)

    joules = result["joules_per_token"]
    if joules is not None:
        battery = f"; a phone's battery holds {_BATTERY / joules:,.0f} tokens" if joules > 0 else ""
        say(f"{joules:.3g} J per token, {result['how']}: {joules / 3.6:.3g} Wh for 1000 tokens{battery}")
    if result["how"] == "measured":
        _show_measured(result, say)
    else:
        _show_estimated(result, say)


def _show_measured(result: dict[str, Any], say: Callable[[str], None]) -> None:
    """Each meter, and idle."""
    say(f"{result['joules_per_token_with_idle']:.3g} J with what the machine takes when idle")
    for name, drawn in result["joules"].items():
        say(f"  {name}: {drawn:.4g} J in {result['seconds']:.3g} s, idle {result['idle_watts'][name]:.3g} W")
    tokens = counted(result["tokens"], "token")
    say(f"{tokens} at {result['tokens_per_s']:.4g} a second, computed with {result['compute']}")
    if result["joules_per_token"] <= 0:
        say("no more than idle: other programs ran while the machine was to idle; measure again")


def _show_estimated(result: dict[str, Any], say: Callable[[str], None]) -> None:
    """The range or the floor, the terms, and why nothing was measured."""
    if result["joules_per_token"] is None:
        say(f"at least {result['floor_joules_per_token']:.3g} J per token, estimated: memory and arithmetic alone.")
        say(f"What {result['device']} takes under load is not known: --watts tells, and gives the whole.")
    else:
        low, high = result["joules_per_token_range"]
        say(f"  between {low:.3g} and {high:.3g}, as published figures differ from such estimates")
        rate = f"{_output.rate(result['tokens_per_s'])} tokens/s on {result['device']}"
        say(f"  {result['share']:g} of {result['watts']:g} W at {rate}")
        say(f"  of which memory and arithmetic alone: {result['floor_joules_per_token']:.3g} J")
    say(f"  {result['read_bytes']:,} bytes a token at {result['pj_per_bit']:g} pJ a bit, {result['macs']:,} products "
        f"at {result['pj_per_mac']:g} pJ")  # fmt: skip
    say(f"not measured: {result['not_measured']}")
