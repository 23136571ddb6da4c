"""Kernels of the CPU, on panels: rows that differ in the engine (an instruction set) and in how activations enter.

All rows share one layout of weights for each tiling, one native product and one torch operator; a row is data that says
which instruction set, which tiling, and how activations enter. Engines give the same bits, so that which row runs
decides about speed and never about results; `compute` decides about results, which is why it can be asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from spicerack.kernels import multiply, panels, torch_op
from spicerack.kernels.kernel import Compute, Kernel, Shape
from spicerack.kernels.panels import Room, Staged, Tiling
from spicerack.numerics.packed import Tensors
from spicerack.numerics.scheme import Scheme
from spicerack.numerics.undecoded import Undecoded


def _row(speed: int, compute: Compute, engine: str, tiling: Tiling = "planes") -> Kernel:
    """The row for `compute` on the engine of that name, which this processor need not have.

    speed: as in `Kernel`, unequal to all others'. tiling: how codes lie in a tile. All rows have the same functions,
    bound to what tells them apart: a row's name, and so what an error or a table of choices shows, is `int8_avx2`, or
    `ternary_avx512vbmi` for the one whose tiles hold trits.
    """
    index = panels.NAMES.index(engine) if engine in panels.NAMES else -1  # which never fits
    return Kernel(
        name=f"{compute if tiling == 'planes' else 'ternary'}_{engine}",
        speed=speed,
        vector=engine != "scalar",
        compute=compute,
        obstacle=partial(_obstacle, compute, engine, tiling),
        pack=partial(panels.pack, tiling=tiling),
        unpack=partial(panels.unpack, tiling=tiling),
        rows=partial(multiply.rows, tiling=tiling),
        prepare=partial(_prepare, compute, tiling),
        run=partial(_run, index),
        engine=engine,
        stage=partial(_stage, tiling),
    )


def _obstacle(
    compute: Compute,
    engine: str,
    tiling: Tiling,
    scheme: Scheme,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
) -> str | None:
    """Why a row cannot run a weight, as the end of a sentence, or None; what all rows have in common `panels.obstacle`
    says.

    compute, engine, tiling   the row's: how activations enter, the instruction set, how codes lie in a tile
    scheme   of the weight
    shape    [N, K]
    dtype    of the inputs
    device   where the weight is to be
    """
    if engine not in panels.NAMES:
        return f"this processor, or this build, has no {engine}"
    if tiling == "trits" and not scheme.is_ternary:
        return "its levels are not -1, 0 and 1"
    if tiling == "trits" and panels.in_blocks(scheme, shape):
        return "trits have one float scale for a group of whole tiles"
    if compute == "float" and scheme.activations is not None:
        return f"{scheme} rounds activations to int8"
    if scheme.activations is not None and scheme.group_columns is None and shape[1] > panels.MAX_EXACT_COLUMNS:
        return f"sums of more than {panels.MAX_EXACT_COLUMNS} products may overflow"
    return panels.obstacle(scheme, shape, dtype, device)


def _stage(tiling: Tiling, q: Undecoded, room: Room) -> Staged:
    """See `Kernel.stage`."""
    return panels.stage(q, tiling, room)


def _prepare(compute: Compute, tiling: Tiling, scheme: Scheme, shape: Shape, tensors: Tensors) -> multiply.PanelMatrix:
    """The weight as `_run` takes it: its panels, and how activations enter for this row and scheme."""
    activations = panels.FLOATS
    if compute == "int8":
        activations = {None: panels.SPANS, "token": panels.TOKENS, "static": panels.FIXED}[scheme.activations]
    spec = panels.spec_of(scheme, shape, tiling)
    zero, outer, fixed = tensors.get("zero"), tensors.get("outer"), tensors.get("input_scale")
    return multiply.PanelMatrix(tensors["codes"], tensors["scale"], zero, outer, spec, activations, fixed)


def _run(
    engine: int,
    x: torch.Tensor,
    matrices: Sequence[multiply.PanelMatrix],
    biases: Sequence[torch.Tensor | None],
) -> list[torch.Tensor]:
    """See `Kernel.run`: the operator where a graph or gradients are made, else the native module at once."""
    if x.dtype == torch.float64:  # which no engine has
        return [y.double() for y in _run(engine, x.float(), matrices, biases)]
    meta = matrices[0].codes.is_meta
    if x.is_meta != meta:  # shapes alone have no product with numbers, as torch's own layers say
        raise TypeError(f"x is on {x.device}, the weight on {matrices[0].codes.device}")
    if type(x) is not torch.Tensor or meta or torch.compiler.is_compiling() or _wants_gradients(x, biases):
        return [
            torch_op.OPERATOR(x, m.codes, m.scale, m.zero, m.outer, bias, m.input_scale, *m.spec, engine, m.activations)
            for m, bias in zip(matrices, biases, strict=True)
        ]
    return multiply.multiply(x, matrices, biases, engine)


def _wants_gradients(x: torch.Tensor, biases: Sequence[torch.Tensor | None]) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or any(b is not None and b.requires_grad for b in biases))


# Speeds say which of the rows that run a weight is taken: the wider the instructions the higher, int8 above floats. The
# scalar engine is below all vectors, whatever they compute with.
KERNELS = (
    # Ternary weights in 1.6 bits, split by byte permutations and bit matrices (VBMI, GFNI) for AVX-512 VNNI.
    _row(170, "int8", "avx512vbmi", "trits"),
    # 16 rows of a panel in a vector of 512 bits, 64 multiply-adds in an instruction.
    _row(160, "int8", "avx512vnni"),
    # The same instructions on vectors of 256 bits, for processors whose clock falls with wide ones.
    _row(150, "int8", "avx512vlvnni"),
    # Intel's client processors without AVX-512.
    _row(140, "int8", "avxvnni"),
    # Pairs of int8 products in 16 bits, then sums of pairs.
    _row(130, "int8", "avx2"),
    # Arm's dot products (Armv8.2 and newer).
    _row(120, "int8", "neon"),
    _row(60, "float", "avx512vnni"),
    _row(50, "float", "avx512vlvnni"),
    _row(40, "float", "avxvnni"),
    _row(30, "float", "avx2"),
    _row(20, "float", "neon"),
    # Portable C++, on every processor.
    _row(15, "int8", "scalar"),
    _row(10, "float", "scalar"),
)
