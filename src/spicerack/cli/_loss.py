"""Losses in words: what `eval` and the check behind `quantize` say of their figures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spicerack.evaluation.check import Check


def short(value: float) -> str:
    """Three digits, or a power of ten where it is below a thousandth."""
    return f"{value:.3g}" if value >= 1e-3 or value == 0 else f"{value:.1e}"


def change(ratio: float) -> str:
    """What perplexity became: a share of what it was, or a multiple once it is twice as high. ratio: new / old - 1."""
    if abs(ratio) < 5e-5:  # which two digits of a per cent would show as 0
        return "unchanged"
    if ratio >= 1:
        return f"{ratio + 1:.3g} times as high"
    return f"{abs(ratio):.2%} {'higher' if ratio > 0 else 'lower'}"


def times(ratio: float) -> str:
    """A multiple, with a digit behind the point as long as that tells something."""
    return f"{ratio:.1f} times" if ratio < 10 else f"{ratio:,.0f} times"


def angle(cosine: float) -> str:
    """The angle of a cosine in degrees; rounding may have put the cosine a little above 1, which counts as 1."""
    return f"{math.degrees(math.acos(min(cosine, 1.0))):.1f} degrees"


def beside_cast(mean: float, floor: float) -> str:
    """A mean KL as a multiple of what a cast to bfloat16 costs; of a floor of 0 nothing is a multiple."""
    return "no more than" if mean <= floor or not floor else times(mean / floor)


def checked(check: Check) -> tuple[str, ...]:
    """The lines that `quantize` prints of its check, two where something was measured, then notes."""
    if check.figures is None:
        told = f"not checked: {check.reason}"
        return (told,) if check.command is None else (told, f"  to measure what was lost: {check.command}")
    figures = check.figures
    first = _decoder(figures) if "kl_mean" in figures else _encoder(figures)
    if "windows" in figures:
        read = f"{figures['tokens']:,} tokens of {figures['text']}"
    else:
        read = f"{figures['sentences']} {figures['text']}"
    taken = f", in {check.seconds:.1f} s" if check.seconds else ""
    second = f"  on {read}{taken} (in brackets 95 % intervals); more: {check.command}"
    return first, second, *(f"  {note}" for note in check.notes)


def _between(ends: list[float] | None, form: Any) -> str:
    """The ends of an interval in brackets, as `form` writes them; nothing for none."""
    return "" if ends is None else f" ({form(ends[0])} to {form(ends[1])})"


def _decoder(figures: Mapping[str, Any]) -> str:
    """What a language model lost, in a line."""
    same = round(1000 * figures["top1_agreement"])
    ends = _between(figures["top1_agreement_ci95"], lambda share: f"{1000 * share:.0f}")
    kl, floor = figures["kl_mean"], figures["kl_noise_floor"]
    cast = "" if floor is None else f", {beside_cast(kl, floor)} a bfloat16 cast's"
    spread = _between(figures["kl_mean_ci95"], short)
    return f"checked: {same} of 1000 next tokens are the original's{ends}; KL {short(kl)}{spread}{cast}"


def _encoder(figures: Mapping[str, Any]) -> str:
    """What an encoder lost, in a line."""
    mean, floor = figures["cosine_mean"], figures["cosine_noise_floor"]
    ends = figures["cosine_mean_ci95"]
    spread = _between(None if ends is None else ends[::-1], lambda cosine: angle(cosine).split(" ")[0])
    cast = "" if floor is None else f"; a bfloat16 cast turns it by {angle(floor)}"
    return f"checked: embeddings turned by {angle(mean)}{spread} on average{cast}"
