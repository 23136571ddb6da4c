"""Who is timed, and how their figures are put side by side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from statistics import median
from typing import Any, Literal

Width = Literal["32", "16", "8", "4", "3", "2", "ternary"]
Result = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """peer: file in `peers/`, and the process it runs in. variant: what its function is told. width: of a weight."""

    name: str
    peer: str
    variant: str
    width: Width
    function: str = "layer"

    @property
    def target(self) -> str:
        return f"benchmarks.harness.peers.{self.peer}:{self.function}"


OURS, BASE = "spicerack", "torch float32"
RIVALS: dict[Width, tuple[Width, ...]] = {"8": ("8",), "4": ("4",), "3": ("4",), "2": ("2",), "ternary": ("2",)}
"""Width of ours -> widths of the peers it is compared with. Nobody else computes in 3 bits; ternary is stored in 2."""

LAYERS = (
    Row(BASE, "torch", "float32", "32"),
    Row("onnxruntime float32", "onnxruntime", "float32", "32"),
    Row("openvino float32", "openvino", "float32", "32"),
    Row("torch bfloat16", "torch", "bfloat16", "16"),
    Row("torch dynamic int8, fbgemm", "torch", "fbgemm", "8"),
    Row("torch dynamic int8, onednn", "torch", "onednn", "8"),
    Row("onnxruntime DynamicQuantizeMatMul", "onnxruntime", "dynamic", "8"),
    Row("onnxruntime MatMulNBits 8 g128", "onnxruntime", "8g128", "8"),
    Row("openvino int8, dynamic", "openvino", "8g0", "8"),
    Row("openvino int8, static", "openvino", "static", "8"),
    Row("torchao int8 dynamic, compiled", "torchao", "int8", "8"),
    Row("spicerack w8", OURS, "w8", "8"),
    Row("spicerack w8a8", OURS, "w8a8", "8"),
    Row("torch int4 g128", "torch", "int4", "4"),
    Row("onnxruntime MatMulNBits 4 g128", "onnxruntime", "4g128", "4"),
    Row("onnxruntime MatMulNBits 4 g32", "onnxruntime", "4g32", "4"),
    Row("openvino int4 g128, dynamic", "openvino", "4g128", "4"),
    Row("openvino int4 g32, dynamic", "openvino", "4g32", "4"),
    Row("spicerack w4g128", OURS, "w4g128", "4"),
    Row("spicerack w4g32", OURS, "w4g32", "4"),
    Row("spicerack w4g32z", OURS, "w4g32z", "4"),
    Row("spicerack w3g64", OURS, "w3g64", "3"),
    Row("onnxruntime MatMulNBits 2 g128", "onnxruntime", "2g128", "2"),
    Row("onnxruntime MatMulNBits 2 g32", "onnxruntime", "2g32", "2"),
    Row("spicerack w2g64", OURS, "w2g64", "2"),
    Row("spicerack w2g32", OURS, "w2g32", "2"),
    Row("spicerack ternary", OURS, "ternary", "ternary"),
    Row("spicerack ternary, a8", OURS, "ternarya8", "ternary"),
)
LIMITS = tuple(Row(name, OURS, name, "32", "limit") for name in ("read_bandwidth", "dot_peak"))
"""What the machine can do at most: bytes/s from memory, operations/s of int8 dot products (two per multiply-add)."""
ENCODERS = (
    Row(BASE, "torch", "float32", "32", "encoder"),
    Row("onnxruntime float32", "onnxruntime", "float32", "32", "encoder"),
    Row("openvino float32", "openvino", "float32", "32", "encoder"),
    Row("torch bfloat16", "torch", "bfloat16", "16", "encoder"),
    Row("torch dynamic int8", "torch", "fbgemm", "8", "encoder"),
    Row("onnxruntime dynamic int8", "onnxruntime", "dynamic", "8", "encoder"),
    Row("openvino int8, dynamic g32", "openvino", "32", "8", "encoder"),
    Row("openvino int8, dynamic g128", "openvino", "128", "8", "encoder"),
    Row("openvino int8, calibrated", "openvino", "static", "8", "encoder"),
    Row("spicerack w8", OURS, "w8", "8", "encoder"),
    Row("spicerack w8a8", OURS, "w8a8", "8", "encoder"),
    Row("spicerack w4g32", OURS, "w4g32", "4", "encoder"),
)
DECODERS = (
    Row("torch bfloat16", "torch", "bfloat16", "16", "decoder"),
    Row("llama.cpp Q8_0", "llama_cpp", "Q8_0", "8", "decoder"),
    Row("spicerack w8", OURS, "w8", "8", "decoder"),
    Row("spicerack w8, linear layers alone", OURS, "w8", "8", "linears"),
    Row("llama.cpp Q4_0", "llama_cpp", "Q4_0", "4", "decoder"),
    Row("llama.cpp Q4_K_M", "llama_cpp", "Q4_K_M", "4", "decoder"),
    Row("spicerack w4g128", OURS, "w4g128", "4", "decoder"),
    Row("spicerack w4g128, linear layers alone", OURS, "w4g128", "4", "linears"),
    Row("spicerack w4g32", OURS, "w4g32", "4", "decoder"),
    Row("spicerack w4g32, linear layers alone", OURS, "w4g32", "4", "linears"),
    Row("llama.cpp TQ2_0", "llama_cpp", "TQ2_0", "2", "decoder"),
    Row("spicerack ternary", OURS, "ternary", "ternary", "decoder"),
    Row("spicerack ternary, linear layers alone", OURS, "ternary", "ternary", "linears"),
)


def chosen(rows: Iterable[Row], only: Sequence[str]) -> list[Row]:
    """The rows whose names match one of the patterns; all, if there are none."""
    return [row for row in rows if not only or any(fnmatch(row.name, pattern) for pattern in only)]


def timed(row: Row, facts: Mapping[str, Any], samples: Sequence[Mapping[str, float]]) -> Result:
    """The row with its facts and, for each figure of a turn, median, min and max."""
    return {"name": row.name, "peer": row.peer, "width": row.width, **facts, **spreads(samples)}


def spreads(samples: Sequence[Mapping[str, float]]) -> Result:
    """figure -> median, min and max over the samples."""
    columns = {figure: [sample[figure] for sample in samples] for figure in samples[0]}
    return {figure: {"median": median(v), "min": min(v), "max": max(v)} for figure, v in columns.items()}


def compared(rows: Sequence[Result], figures: Sequence[str]) -> list[Result]:
    """Ours get best_peer and ratio by figure: the fastest peer of the same width, and its time over ours."""
    out = []
    for row in rows:
        rivals = [r for r in rows if r["peer"] != OURS and r["width"] in RIVALS.get(row["width"], ())]
        if row["peer"] == OURS and rivals:
            best = {figure: min(rivals, key=lambda r: float(r[figure]["median"])) for figure in figures}
            row = row | {
                "best_peer": {figure: rival["name"] for figure, rival in best.items()},
                "ratio": {f: rival[f]["median"] / row[f]["median"] for f, rival in best.items()},
            }
        out.append(row)
    return out
