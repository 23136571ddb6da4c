"""SentencePiece's map of characters (`precompiled_charsmap`): whether it can be used without reading outside of it.

Four bytes say how long a double array (Darts-clone's) is; behind it are the replacements, each ended by a zero. Whoever
looks something up goes from unit to unit by indices that stand in the units, and tokenizers does not check them: it
panics, which is no exception that a program expects. So all of them are checked before.
"""

from __future__ import annotations

import numpy as np

_LEAF = np.uint32(1 << 31)
"""Marks units that hold a value, the place of a replacement."""
_HAS_LEAF = np.uint32(1 << 8)
"""Marks units of which a replacement is known."""


def obstacle(table: bytes) -> str | None:
    """Why a map cannot be used; None if it can."""
    if len(table) < 4:
        return "is shorter than its own head"
    size = int.from_bytes(table[:4], "little")
    if size % 4 or not 0 < size <= len(table) - 4:
        return f"has {len(table)} bytes and promises an array of {size}"
    units = np.frombuffer(table, np.dtype("<u4"), size // 4, 4).astype(np.uint32)
    inner = (units & _LEAF) == 0
    base = (units >> 10) << ((units & np.uint32(1 << 9)) >> np.uint32(6))
    after = np.arange(len(units), dtype=np.uint32) ^ base
    if ((after | np.uint32(255)) >= len(units))[inner].any():
        return "leads outside of its array"
    values = units[after[inner & ((units & _HAS_LEAF) != 0)]] & ~_LEAF
    replacements = table[4 + size :]
    try:
        replacements.decode()
    except UnicodeDecodeError:
        return "has replacements that are not text in UTF-8"
    if not len(values):
        return None
    if int(values.max()) >= len(replacements) or not replacements.endswith(b"\0"):
        return "leads outside of its replacements"
    starts = np.frombuffer(replacements, np.uint8)[values]
    return "leads into the middle of a character" if ((starts & 0xC0) == 0x80).any() else None
