"""What messages have in common."""

from __future__ import annotations

import pytest

from spicerack.errors import counted, listed


@pytest.mark.parametrize(("count", "noun", "between", "expected"), [
    (1, "layers", ", ", "l0"),
    (3, "layers", ", ", "l0, l1, l2"),
    (4, "layers", ", ", "l0, l1, l2 and 1 more layer"),
    (5, "", ", ", "l0, l1, l2 and 2 more"),
    (3, "", "\n  ", "l0\n  l1\n  l2"),
    (5, "", "\n  ", "l0\n  l1\n  l2\n  and 2 more"),
])  # fmt: skip
def test_few_of_many_are_listed(count: int, noun: str, between: str, expected: str) -> None:
    assert listed([f"l{i}" for i in range(count)], 3, noun, between=between) == expected


def test_numbers_of_things() -> None:
    assert [counted(count, "turn") for count in (0, 1, 2, 2048)] == ["0 turns", "1 turn", "2 turns", "2,048 turns"]
