"""Texts on which two tokenizers are compared: short strings of one character of each kind that tokenizers tell apart.

What cuts a text is made of regular expressions over classes of characters, a few words (English contractions) and
counts (digits in threes). Two that cut every string of three kinds, the contractions, and runs of each kind in the same
places cut all text in the same places, up to characters that only one of them lists.
"""

from __future__ import annotations

import itertools
from functools import cache

_KINDS = tuple(
    "aZ\u00e9\u00c9\u01c5\u02b0\u0928\u0301\u093e\u6211\u306e\u30ab\ud55c\u3131\u0e01"
    "1\u0663\u2167\u00bd \t\n\r\u00a0\u3000"
    "'.,_/-(|$+\u2026\uff0c\u20ac\U0001f600\u200d"
)
"""Letters small, capital, in title case, modifying, of no case and of several scripts; marks; numbers of three kinds;
white space of several; punctuation and symbols that some list and others do not, and a character of format."""
_LINES = (
    "I'm, you're, he'S, they'LL, we've, I'd, can't; 'tis 'RE 'told 'Ve a'lL x'd\u00e9 \u00e9's",
    "1 12 123 1234 12345 123456 1234567 12345678 3.14 1,000,000 a1234b 12345abc \u0663\u0663\u0663\u0663\u0663 v1.2.3",
    "HelloWorld helloWORLD \u00c9cole\u00c9COLE iPhone HTMLParser \u00c6rosk\u00f8bing stra\u00dfe ",
    "\u0416\u0443\u0416\u0423",
    "def f(x):\n    return x\n\n\n\tif x:\r\n\t\t  pass  \n   \n end   ",
    "<sentinel:12> IMGIMGABCZ http://a.b/c?d=e&f#g --- === !!! \u2026\u3002\u3001\u0964 \u201cq\u201d \u2018q\u2019",
    "\u2014 ```x```",
    "\u6211\u5728\u5357\u4eac\u8def1234\u53f7\u3002 \u6771\u4eac\u306f\u30ab\u30bf\u30ab\u30ca \ud55c\uad6d\uc5b4",
    "\u0e44\u0e17\u0e22 \u0939\u093f\u0928\u094d\u0926\u0940 \U0001f600\u200d\U0001f525 cafe\u0301",
)
_RUNS = (2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 33)


@cache
def short_texts() -> tuple[str, ...]:
    """Lines of ordinary text, runs, and each kind of character before each: what differs, differs mostly here."""
    runs = tuple(f"{kind}{other * count}{kind}" for kind in "a1. " for other in _KINDS for count in _RUNS)
    return (*_LINES, *runs, *(" " * count + "a" for count in (511, 512, 513, 700)), *map("".join, _pairs()))


@cache
def long_texts() -> tuple[str, ...]:
    """All strings of three kinds, each once: de Bruijn's sequence (Fredricksen and Maiorana), a text for each kind.

    Each text goes on with two characters of the next, so that no string is lost between them.
    """
    parts = [
        first + "".join(first + second + third for second in _KINDS[at:] for third in _KINDS[at + 1 :])
        for at, first in enumerate(_KINDS)
    ]
    return tuple(part + "".join([*parts[at + 1 :], *parts])[:2] for at, part in enumerate(parts))


def _pairs() -> itertools.product[tuple[str, ...]]:
    return itertools.product(_KINDS, repeat=2)
