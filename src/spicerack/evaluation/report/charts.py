"""Pictures, as HTML and SVG that need no script: bars, a hundred dots, a histogram with levels, a strip of bits.

Each says in words what it shows, and a table with the same numbers stands near it; colour is never alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spicerack.evaluation.report.markup import Markup, join, say, short, tag, text

_WIDTH, _HEIGHT, _BINS = 640, 180, 48
_FEET = 34
"""Height below the histogram, for levels and the axis."""


def bars(rows: Sequence[tuple[Markup, float, str]]) -> Markup:
    """A bar for each (name, number, number as it is written), in the order given, as parts of the largest."""
    most = max((value for _, value, _ in rows), default=1) or 1
    lines = [
        tag(
            "div",
            tag("span", name, class_="what"),
            tag("span", tag("span", class_="bar", style=f"width:{100 * value / most:.1f}%"), class_="track"),
            tag("b", shown),
            class_="row",
        )
        for name, value, shown in rows
    ]
    return tag("div", *lines, class_="bars")


def dots(same: int) -> Markup:
    """A hundred, of which `same` are filled; the text beside it says the number."""
    cells = (tag("i", class_="same" if i < same else "other") for i in range(100))
    return tag("div", *cells, class_="dots", aria_hidden="true")


def lens(row: dict[str, Any], bits: int) -> Markup:
    """The histogram of a few weights, and on it the levels of each number of bits; those of `bits` are shown first."""
    weights = row["weights"]
    low, high = min(weights), max(weights)
    span = (high - low) or 1.0
    counts = [0] * _BINS
    for weight in weights:
        counts[min(int((weight - low) / span * _BINS), _BINS - 1)] += 1
    step, most = _WIDTH / _BINS, max(counts)
    columns = [
        tag("rect", x=f"{i * step + 0.5:.1f}", y=f"{_HEIGHT * (1 - n / most):.1f}", width=f"{step - 1:.1f}",
            height=f"{_HEIGHT * n / most:.1f}", class_="count")
        for i, n in enumerate(counts) if n
    ]  # fmt: skip
    groups = [_levels(rounded, low, span, shown=rounded["bits"] == bits) for rounded in row["rounded"]]
    axis = [
        tag("text", short(low), x=0, y=_HEIGHT + _FEET, class_="axis"),
        tag("text", short(high), x=_WIDTH, y=_HEIGHT + _FEET, class_="axis end"),
    ]
    return tag("svg", *columns, *groups, *axis, viewBox=f"0 0 {_WIDTH} {_HEIGHT + _FEET + 4}", role="img",
               aria_labelledby="lens-title", class_="lens")  # fmt: skip


def _levels(rounded: dict[str, Any], low: float, span: float, shown: bool) -> Markup:
    """A line through the histogram for each level that lies in the picture."""
    places = [(level - low) / span * _WIDTH for level in rounded["levels"]]
    path = "".join(f"M{x:.1f} 0V{_HEIGHT + 14}" for x in places if -1 <= x <= _WIDTH + 1)
    return tag("path", d=path, class_="levels" + (" on" if shown else ""), data_bits=rounded["bits"])


def strip(blocks: Sequence[dict[str, Any]]) -> Markup:
    """A table of bits: a line for each block, a column for each kind of layer, the more bits the darker."""
    kinds = list(dict.fromkeys(row["layer"] for row in blocks))
    places = list(dict.fromkeys(row["block"] for row in blocks))
    cells = {(row["block"], row["layer"]): row for row in blocks}
    head = tag("tr", tag("th", say("block", "层"), scope="col"), *(tag("th", kind, scope="col") for kind in kinds))
    lines = []
    for place in places:
        name = say("outside", "层外") if place is None else text(place)
        lines.append(tag("tr", tag("th", name, scope="row"), *(_cell(cells.get((place, kind))) for kind in kinds)))
    caption = say(
        "Bits of a weight, scales counted; below it the error of rounding. Darker is more bits.",
        "每个权重的位数(含标签);下面是舍入误差。颜色越深,位数越多。",
    )
    whole = tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *lines), class_="strip")
    return tag("div", whole, class_="scroll", tabindex=0, role="region", aria_label="bits / 位数")


def _cell(row: dict[str, Any] | None) -> Markup:
    """Bits and error of one kind of layer in one block; empty where there is none."""
    if row is None:
        return tag("td", "")
    shade = max(6, min(round((row["bits"] - 1) * 8), 60))
    return tag("td", join(f"{row['bits']:.2f}", tag("small", short(row["error"]))), style=f"--shade:{shade}%")
