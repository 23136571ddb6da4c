"""HTML whose texts are escaped: names of tensors and models are strangers' texts.

`tag` and `say` escape whatever is not `Markup`; numbers are put into sentences by the functions at the end, which are
all that a number can look like on the page.
"""

from __future__ import annotations

import html
import re
from typing import Any

_HAN = "\\u3400-\\u9fff\\u201d"
"""Chinese characters, and the quote that closes, in a pattern."""
_WIDER = 0xFEE0
"""From a sign of ASCII to the same as wide as a Chinese character."""


class Markup(str):
    """HTML that is finished."""

    __slots__ = ()


def text(value: object) -> Markup:
    """HTML of anything: escaped, unless it is HTML."""
    if isinstance(value, Markup):
        return value
    printable = "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in str(value))
    return Markup(html.escape(printable, quote=True))


def tag(name: str, *children: object, **attributes: object) -> Markup:
    """An element. attributes: a trailing underscore is dropped, others become hyphens; those that are None are left
    out, and True has no value."""
    words = []
    for key, value in attributes.items():
        if value is not None and value is not False:
            key = key.rstrip("_").replace("_", "-")
            words.append(key if value is True else f'{key}="{text(value)}"')
    begin = " ".join([name, *words])
    return Markup(f"<{begin}>{''.join(map(text, children))}</{name}>")


def join(*children: object) -> Markup:
    """One behind the other."""
    return Markup("".join(map(text, children)))


def say(en: str, zh: str, **values: object) -> Markup:
    """A text in both languages, of which the page shows one; without scripts both. {names} are values, escaped."""
    filled = {key: text(value) for key, value in values.items()}
    return join(*(
        tag("span", Markup(html.escape(words, quote=False).format(**filled)), lang=lang, class_="t")
        for lang, words in (("en", en), ("zh-CN", _chinese(zh)))
    ))  # fmt: skip


def _chinese(words: str) -> str:
    """Punctuation behind Chinese characters, values and quotes becomes as wide as they are, and brackets around them.

    Sources have it narrow, so that nobody takes a wide comma in a program for one of its own.
    """
    wide = re.sub(rf"(?:(?<=[{_HAN}])\(([^()]*)\)|\(([^()]*[{_HAN}][^()]*)\))", _wide_brackets, words)
    return re.sub(rf"(?<=[{_HAN}\uff09}}])[,;:?!]", lambda mark: chr(ord(mark[0]) + _WIDER), wide)


def _wide_brackets(match: re.Match[str]) -> str:
    return chr(ord("(") + _WIDER) + (match[1] or match[2] or "") + chr(ord(")") + _WIDER)


def section(title: Markup, *children: object) -> Markup:
    """A part of the page under its title."""
    return tag("section", tag("h2", title), *children)


def missing(command: str, en: str, zh: str) -> Markup:
    """That something was not measured, and what measures it."""
    return tag("p", say(
        f"Missing: {en}. This measures it: {{command}}", f"缺少:{zh}。运行此命令即可测量:{{command}}",
        command=tag("code", f"spicerack {command}"),
    ), class_="none")  # fmt: skip


def labelled(how: str) -> Markup:
    """measured or estimated."""
    return tag("span", say(how, {"measured": "实测", "estimated": "估算"}[how]), class_="tagged")


def table(caption: Markup, head: list[Markup], rows: list[list[Any]], *, wide: bool = True) -> Markup:
    """The first cell of a row is its head. It can be scrolled by keys; `wide` ones of four columns and more are on a
    phone."""
    lines = [tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])) for row in rows]
    heads = [tag("th", cell, scope="col") for cell in head]
    whole = tag("table", tag("caption", caption), tag("thead", tag("tr", *heads)), tag("tbody", *lines))
    broad = " wide" if wide and len(head) > 3 else ""
    return tag("div", whole, class_=f"scroll{broad}", tabindex=0, role="group", aria_label="table / 表")


def machine(record: Any) -> Markup:
    """The processor that something was measured on, or the system where nobody knows; a dash for no record of it."""
    known = record if isinstance(record, dict) else {}
    return text(known.get("processor") or known.get("platform") or "\N{EN DASH}")


# ---- numbers ---------------------------------------------------------------------------------------------------------


def size(nbytes: float) -> str:
    """Bytes in decimal units, as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


def short(value: float | None) -> str:
    """Three digits, thousands in groups; a dash for none."""
    if value is None:
        return "\N{EN DASH}"
    return f"{float(f'{value:.3g}'):,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def spread(low: float, high: float) -> str:
    """From one to the other."""
    return f"{short(low)} \N{EN DASH} {short(high)}"


def whole(value: float) -> str:
    """An integer, in groups of three."""
    return f"{value:,.0f}"


def hundred(share: float) -> str:
    """How many of 100, never rounded up to all of them: 99.7 % is not 100."""
    return f"{math_floor(100 * share, 1):g}"


def math_floor(value: float, digits: int) -> float:
    """value, rounded down to so many digits behind the point."""
    factor = 10.0**digits
    return int(value * factor + 1e-9) / factor
