"""Attention of many heads by the native kernel, in float32 whatever the type.

It runs on the engines of the products, for models whose own code would call torch's (`nn.attention` puts it there). No
matrix of scores is kept: keys are taken some at a time, sums shrink when a larger score comes (the online softmax of
Milakov and Gimelshein 2018, arXiv:1805.02867). So memory is that of the results, however long the text is. What it
cannot do `obstacle` says, and torch does.

What is given up. There are no gradients and no dropout, masks hide keys and add nothing, and a head's width is a
multiple of 16, the numbers that the kernel works on at a time. Sums run in another order than torch's, so that the last
bits of a result are not torch's.
"""

from __future__ import annotations

import torch

from spicerack import _native
from spicerack.errors import ShapeError
from spicerack.kernels import panels, pool
from spicerack.kernels.panels import PANEL, TYPES

_NO_MASK = (0, 0, 0, 0)
"""The place of a mask that hides nothing: the kernel reads none at address 0."""


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    causal: bool = False,
    scale: float,
    engine: str | None = None,
) -> torch.Tensor:
    """softmax(q k^T * scale) v, in float32 whatever the type -> [B, L, H, V], contiguous, in q's type.

    q       [B, H, L, D]: float32, float16 or bfloat16, on the CPU; D and V are multiples of 16
    k, v    [B, G, S, D] and [B, G, S, V], of q's type: H / G heads of q share one of k and v
    mask    bool, broadcast to [B, H, L, S]; False hides a key
    causal  query i sees keys 0..i
    scale   of the scores, before softmax
    engine  one of `panels.NAMES`; None is the fastest. All give the same bits

    A query that sees no key gets zeros. No gradients; as many threads as torch uses. Raises ShapeError, and UsageError
    for an engine that this processor has not; `obstacle` tells of shapes beforehand.
    """
    reason = obstacle(q, k, v, mask)
    if reason is not None:
        raise ShapeError(f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}: {reason}", "use torch's attention")
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    batch, heads, queries, width = q.shape
    kv_heads, keys, value_width = k.shape[1], k.shape[2], v.shape[3]
    shape = (batch, queries, heads, value_width)
    large = batch * queries * heads * value_width >= pool.LARGE
    y = pool.empty(shape, q.dtype) if large else q.new_empty(shape)
    if not y.numel():
        return y
    if not keys:  # the softmax of nothing: as of a query that sees no key
        return y.zero_()
    mask = None if mask is None else _spread(mask, batch, heads, queries, keys)
    sizes = (batch, heads, kv_heads, queries, keys, width, value_width)
    places = (_place(q), _place(k), _place(v), _NO_MASK if mask is None else _place(mask))
    index = panels.engine_index(engine)
    _native.attention(index, TYPES[q.dtype], *places, y.data_ptr(), sizes, causal, scale)
    return y


def obstacle(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> str | None:
    """Why `attention` cannot run these, as the end of a sentence, or None if it can.

    The arguments are those of `attention`. Asked before each call by who has torch's attention to fall back to; it
    looks at types, axes and widths only, and at no number.
    """
    if not (q.dim() == k.dim() == v.dim() == 4 and q.is_cpu and k.is_cpu and v.is_cpu):
        return "it takes three tensors of four axes, on the CPU"
    if q.dtype not in TYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        return "it takes one type: float32, float16 or bfloat16"
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        return "shapes do not belong together"
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        return "heads of k do not divide those of q"
    if not q.shape[3] or q.shape[3] % PANEL or not v.shape[3] or v.shape[3] % PANEL:
        return f"widths are no multiples of {PANEL}"
    if mask is not None and (mask.dtype != torch.bool or mask.dim() != 4 or not mask.is_cpu):
        return "it takes boolean masks of four axes"
    return None


def _spread(mask: torch.Tensor, batch: int, heads: int, queries: int, keys: int) -> torch.Tensor:
    """`mask` as [B, H, L, S], keys side by side: a view of it with steps of 0, or a copy where keys lie apart.

    A single key is side by side with itself, whatever its stride says.
    """
    mask = mask.expand(batch, heads, queries, keys)
    return mask if mask.stride(3) == 1 or keys == 1 else mask.contiguous()


def _place(t: torch.Tensor) -> tuple[int, int, int, int]:
    """Where a tensor of four axes lies: its address, and the steps of the first three axes, in elements.

    The last axis has steps of 1: `attention` copies what has others. Views and heads that share keys need no copy.
    """
    batch, head, row, _ = t.stride()
    return t.data_ptr(), batch, head, row
