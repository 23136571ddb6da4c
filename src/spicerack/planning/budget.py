"""Budgets as people write them: a size, bits of a weight, a bound on what is lost. No torch.

--size 4.2GB, "4.2 GB", 4200MB, 4GiB     bytes of the files of weights: decimal units, or with an i binary ones
--bits 3.5                               of a quantized weight, scales counted, on average
--max-kl 0.01                            nats per token, on text that the search has not seen
--max-loss 1% or 0.01                    perplexity more, or of encoders 1 - cosine, on the same text
"""

from __future__ import annotations

import math
import re
from decimal import Decimal

from spicerack.errors import UsageError
from spicerack.planning.sensitivity import Budget

_UNITS = {"": 1, "b": 1} | {f"{p}b": 1000**i for i, p in enumerate("kmgt", 1)} | {
    f"{p}{end}": 1024**i for i, p in enumerate("kmgt", 1) for end in ("ib", "i")
}  # fmt: skip
"""What may stand behind a number of bytes."""
_WIDEST = 16
"""Bits above which nothing is a budget: floats have no more."""


def budget_of(
    size: str | int | None = None,
    bits: float | None = None,
    max_kl: float | None = None,
    max_loss: str | float | None = None,
) -> Budget | None:
    """The one budget among these; None where there is none.

    size       bytes, or with a unit, see the module
    bits       of a quantized weight
    max_kl     nats per token
    max_loss   "1%", or a share below 1

    Raises UsageError for two at once, and for what is no such number, in the words of the command line.
    """
    given = {
        "--size": size, "--bits": bits, "--max-kl": max_kl, "--max-loss": max_loss,
    }  # fmt: skip
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise UsageError(f"{' and '.join(named)}: a run has one budget", f"leave out {named[-1]}")
    if size is not None:
        return Budget("size", _bytes(size))
    if bits is not None:
        return Budget("bits", _positive("--bits", bits, "3.5", _WIDEST))
    if max_kl is not None:
        return Budget("max_kl", _positive("--max-kl", max_kl, "0.01"))
    return None if max_loss is None else Budget("max_loss", _share(max_loss))


def told(budget: Budget) -> str:
    """The budget in words, without what names its option: "4.2 GB", "3.5 bits", "KL 0.01", "1 % of perplexity"."""
    value = budget.value
    return {
        "size": f"{value:,.0f} bytes", "bits": f"{value:g} bits a weight", "max_kl": f"KL of {value:g} at most",
        "max_loss": f"loss of {value:.3g} at most, {value:.3%}",
    }[budget.kind]  # fmt: skip


def _bytes(size: str | int) -> int:
    """A number of bytes, whole ones. Raises UsageError."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*([a-z]{0,3})", str(size).strip().lower())
    unit = None if match is None else _UNITS.get(match[2])
    found = 0 if match is None or unit is None else int(Decimal(match[1]) * unit)
    if not 0 < found < 1 << 60:
        raise UsageError(f"--size {size!r} is not a size", "for example --size 4.2GB, 4200MB or 4GiB")
    return found


def _positive(name: str, value: float, example: str, most: float = math.inf) -> float:
    """The number, if it is above 0 and finite. Raises UsageError."""
    if not (math.isfinite(value) and 0 < value <= most):
        bound = f" up to {most:g}" if math.isfinite(most) else ""
        raise UsageError(f"{name} {value:g} is no number above 0{bound}", f"for example {name} {example}")
    return float(value)


def _share(value: str | float) -> float:
    """A share of 1, from "1%" or 0.01. Raises UsageError, for 1 and more without a sign, too: who writes 1 means 1%."""
    text = str(value).strip()
    match = re.fullmatch(r"(\d{0,4}(?:\.\d{1,12})?(?:e-?\d{1,2})?)\s*(%?)", text.lower())
    try:
        number = float(match[1]) / (100 if match[2] else 1) if match else math.nan
    except ValueError:
        number = math.nan
    if not 0 < number < 1:
        hint = f"--max-loss {text}% or {number / 100:g}" if match and not match[2] and number >= 1 else "--max-loss 1%"
        raise UsageError(f"--max-loss {text!r} is no share between 0 and 100%", hint)
    return number
