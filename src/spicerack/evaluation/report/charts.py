"""Pictures, as HTML and SVG that need no script: bars, a hundred dots, a histogram with levels, a strip of bits.

Each says in words what it shows, and a table with the same numbers stands near it; colour is never alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from spicerack.evaluation.report.markup import Markup, join, say, short, size, tag, text

_WIDTH, _HEIGHT, _BINS = 640, 180, 48
_SIDE = 96
"""Width left of the curve, for its axis."""
_RAISED = {ord(sign): chr(raised) for sign, raised in zip(
    "-0123456789", (0x207B, 0x2070, 0xB9, 0xB2, 0xB3, *range(0x2074, 0x207A)), strict=True,
)}  # fmt: skip
"""Signs of an exponent -> the same, raised."""
_TOP = 20
"""Height above it: half a line of text on a phone."""
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
    return tag("div", whole, class_="scroll", tabindex=0, role="group", aria_label="bits / 位数")


def _cell(row: dict[str, Any] | None) -> Markup:
    """Bits and error of one kind of layer in one block; empty where there is none."""
    if row is None:
        return tag("td", "")
    shade = max(6, min(round((row["bits"] - 1) * 6), 45))
    return tag("td", join(f"{row['bits']:.2f}", tag("small", short(row["error"]))), style=f"--shade:{shade}%")


def scale(floor: float, mean: float) -> Markup:
    """A line from a millionth to 1, in powers of ten: where a cast to bfloat16 lies, and where this model."""
    low = -6.0

    def at(value: float) -> str:
        place = (min(max(math.log10(max(value, 1e-12)), low), 0.0) - low) / -low
        return f"left:{100 * place:.1f}%"

    marks = [
        tag("span", tag("span", say("plain cast", "普通转换"), class_="name"), class_="mark cool", style=at(floor)),
        tag("span", tag("span", say("this model", "这个模型"), class_="name"), class_="mark", style=at(mean)),
    ]
    ends = [
        tag("span", say("no difference", "毫无差别")),
        tag("span", say("another model", "换了一个模型")),
    ]
    return join(
        tag("div", *marks, class_="scale", aria_hidden="true"), tag("div", *ends, class_="ends", aria_hidden="true")
    )


def curve(points: Sequence[dict[str, Any]], rounds: Sequence[dict[str, Any]]) -> Markup:
    """Loss, in powers of ten, against bytes: a curve of what is predicted, dots with intervals of what was measured."""
    sizes = [p["nbytes"] for p in (*points, *rounds)]
    measured = [value for r in rounds for value in (r["measured"], *r["interval"])]
    losses: list[float] = [value for value in (*(p["predicted"] for p in points), *measured) if value > 0] or [1e-3]
    left, right = float(min(sizes)), float(max(sizes))
    low = math.floor(math.log10(min(losses)))
    high = max(math.ceil(math.log10(max(losses))), low + 1)
    inner, foot = _WIDTH - _SIDE, 240

    def x(nbytes: float) -> float:
        return _SIDE + (nbytes - left) / max(right - left, 1) * (inner - 12)

    def y(loss: float) -> float:
        return _TOP + foot * (high - math.log10(max(loss, 10.0**low))) / (high - low)

    grid = [
        part
        for power in range(low, high + 1)
        for part in (
            tag("path", d=f"M{_SIDE} {y(10.0**power):.1f}H{_WIDTH}", class_="grid"),
            tag("text", _power(power), x=_SIDE - 8, y=f"{y(10.0**power) + 4:.1f}", class_="axis end"),
        )
    ]
    ends = [
        tag("text", size(left), x=_SIDE, y=foot + _TOP + 26, class_="axis"),
        tag("text", size(right), x=_WIDTH, y=foot + _TOP + 26, class_="axis end"),
    ]
    path = "L".join(f"{x(p['nbytes']):.1f} {y(p['predicted']):.1f}" for p in points)
    dots = [
        part
        for number, r in enumerate(rounds, start=1)
        for part in (
            tag("path", class_="whisker",
                d=f"M{x(r['nbytes']):.1f} {y(r['interval'][0]):.1f}V{y(r['interval'][1]):.1f}"),
            tag("circle", cx=f"{x(r['nbytes']):.1f}", cy=f"{y(r['measured']):.1f}", r=8 if number == len(rounds) else 4,
                class_="dot"),
        )
    ]  # fmt: skip
    line = tag("path", d=f"M{path}", class_="line")
    return tag("svg", *grid, *ends, line, *dots, viewBox=f"0 0 {_WIDTH} {foot + _TOP + 32}", role="img",
               aria_labelledby="curve-title", class_="curve")  # fmt: skip


def _power(power: int) -> str:
    """A power of ten, its exponent in raised digits."""
    return "10" + str(power).translate(_RAISED)


def heat(cells: Sequence[dict[str, Any]]) -> Markup:
    """A table of losses: a line for each block, a column for each part, the more is lost the darker."""
    kinds = list(dict.fromkeys(cell["layer"] for cell in cells))
    places = sorted({cell["block"] for cell in cells}, key=lambda block: (block is None, block or 0))
    known = {(cell["block"], cell["layer"]): cell for cell in cells}
    most = max((cell["loss"] for cell in cells), default=0) or 1
    head = tag("tr", tag("th", say("block", "层"), scope="col"), *(tag("th", kind, scope="col") for kind in kinds))
    lines = []
    for place in places:
        name = say("outside", "层外") if place is None else text(place)
        row = [known.get((place, kind)) for kind in kinds]
        lines.append(tag("tr", tag("th", name, scope="row"), *(_hot(cell, most) for cell in row)))
    caption = say(
        "What each part loses in the numbers that it has now; below the loss what these are. Darker loses more.",
        "每一部分在选定的数制下造成的损失;损失下面是数制。颜色越深,损失越大。",
    )
    whole = tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *lines), class_="strip")
    return tag("div", whole, class_="scroll", tabindex=0, role="group", aria_label="losses / 损失")


def _hot(cell: dict[str, Any] | None, most: float) -> Markup:
    """Loss and scheme of one part of one block; empty where there is none."""
    if cell is None:
        return tag("td", "")
    shade = round(45 * max(cell["loss"], 0) / most)
    return tag("td", join(short(cell["loss"]), tag("small", cell["scheme"])), style=f"--shade:{shade}%")
