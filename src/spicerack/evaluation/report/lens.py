"""A few weights under a lens: their values, and the levels that 2 to 8 bits would round them to.

They are the beginning of a row of the tensor whose error is the median of all, as many as share a scale, and are
rounded plainly, with a scale of their own: what is shown is rounding itself, without what calibration does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from spicerack.errors import SchemeError
from spicerack.models.opening import open_model
from spicerack.numerics import codec
from spicerack.numerics.qtensor import QTensor
from spicerack.numerics.scheme import parse
from spicerack.storage import ledger, records
from spicerack.storage.ledger import Entry

_MOST = 1024
"""Weights that are kept."""
BITS = range(2, 9)
"""What is tried."""
_DIGITS = 6
"""Significant ones of what is kept: more than a picture shows."""


def keep(out: Path, source: Path) -> None:
    """Leave the weights and their levels in `out`, as `lens.json`, where there are some: see `look`."""
    row = look(out, source)
    if row is not None:
        records.keep(out, "lens", row)


def look(out: Path, source: Path) -> dict[str, Any] | None:
    """The weights and their levels; None where the ledger of `out` has no matrix with an error, or the float model
    `source` has no such tensor.

    Keys: tensor, scheme, weights, and for each number of bits bits, levels, error (relative, of these weights).
    """
    written = ledger.read(out)
    entry = None if written is None else _median(written.entries)
    if entry is None:
        return None
    checkpoint = open_model(source)
    if entry.tensor not in checkpoint.tensors:
        return None
    w = checkpoint.read(entry.tensor)[0].float()
    w = w[: min(_together(entry), _MOST)]
    return {
        "tensor": entry.tensor,
        "scheme": entry.scheme,
        "weights": _rounded(w),
        "rounded": [_at(w[None], bits) for bits in BITS],
    }


def _median(entries: tuple[Entry, ...]) -> Entry | None:
    """The quantized matrix whose error is in the middle."""
    known = [entry for entry in entries if entry.action == "quantize" and len(entry.shape) == 2 and entry.error]
    return sorted(known, key=lambda entry: (entry.error or 0, entry.tensor))[len(known) // 2] if known else None


def _together(entry: Entry) -> int:
    """Weights of a row that share a scale; all of it where the ledger names numbers that are none of ours."""
    try:
        return parse(str(entry.scheme)).group_shape(*entry.shape)[1]
    except SchemeError:
        return entry.shape[1]


def _at(w: torch.Tensor, bits: int) -> dict[str, Any]:
    """w [1, K], rounded to so many bits with one scale."""
    scheme = parse(f"w{bits}")
    q = codec.encode(w, scheme)
    integers = scheme.levels.integers
    assert integers is not None and isinstance(q.scale, torch.Tensor)
    codes = torch.arange(integers.lo, integers.hi + 1, device="cpu", dtype=torch.int8)[None]
    levels = codec.decode(QTensor(scheme=scheme, codes=codes, scale=q.scale))[0]
    error = float((codec.decode(q) - w).norm() / w.norm().clamp(min=1e-30))
    return {"bits": bits, "levels": _rounded(levels), "error": float(f"{error:.{_DIGITS}g}")}


def _rounded(values: torch.Tensor) -> list[float]:
    return [float(f"{value:.{_DIGITS}g}") for value in values.tolist()]
