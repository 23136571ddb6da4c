"""What every peer's script is given and what it hands back; run by each peer's own Python, so only torch is needed.

    SCRIPT MODEL_FOLDER TOKENS.safetensors SPEC OUT_FOLDER

OUT_FOLDER is the model again, in float32: the linear layers inside of blocks hold what the peer's codes decode to, all
else is as it was. So peers differ in nothing but how they round. The last line printed is JSON.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

sys.path.append(str(Path(__file__).parents[3] / "src"))  # that module needs nothing but Python
from spicerack.machine.memory import peak_rss_bytes

__all__ = ["Job", "finish", "job", "peak_rss_bytes", "tell"]

WEIGHTS = "model.safetensors"


@dataclass(frozen=True, slots=True)
class Job:
    """ids: calibration tokens, int64 [samples, length]. beside: a file for what a peer derives from them."""

    model: Path
    ids: torch.Tensor
    spec: str
    output: Path
    beside: Path

    def weights(self) -> dict[str, torch.Tensor]:
        """The weights to quantize by their names, float32 [N, K]. Without whole groups a layer stays in float."""
        found = re.match(r"w\dg(\d+)", self.spec)
        group = int(found[1]) if found else 1
        return {name: w for name, w in self.linear().items() if w.shape[1] % group == 0}

    def linear(self) -> dict[str, torch.Tensor]:
        """Those of all linear layers in blocks, float32 [N, K]."""
        return {name: w.float() for name, w in _tensors(self.model).items() if _quantized(name)}

    def integers(self) -> tuple[int, int, frozenset[str]]:
        """`w4g64,asym,mse` -> bits 4, columns of a group 64, and the words after them {"asym", "mse"}."""
        found = re.fullmatch(r"w(\d)g(\d+)((?:,\w+)*)", self.spec)
        if found is None:
            raise SystemExit(f"{self.spec} is not like w4g64 or w4g64,asym")
        return int(found[1]), int(found[2]), frozenset(found[3].split(",")) - {""}


def job() -> Job:
    """What the command line asks for."""
    if len(sys.argv) != 5:
        raise SystemExit("give MODEL_FOLDER TOKENS.safetensors SPEC OUT_FOLDER")
    model, tokens, spec, output = sys.argv[1:]
    torch.manual_seed(0)
    return Job(Path(model), load_file(tokens)["input_ids"], spec, Path(output), Path(f"{tokens}.derived"))


def tell(given: Job, package: str, *, bits: float, seconds: float, notes: str, **more: Any) -> None:
    """Print the line. bits: of a weight, with all that the peer stores beside the codes."""
    line = {"peer": package, "version": metadata.version(package), "spec": given.spec, "bits": round(bits, 4)}
    print("\n" + json.dumps(line | {"seconds": round(seconds, 2), "notes": notes} | more), flush=True)


def finish(
    given: Job, weights: dict[str, torch.Tensor], package: str, *, bits: float, seconds: float, notes: str, **more: Any
) -> None:
    """Write the folder, and `tell`. weights: decoded, by the names of `Job.weights`. seconds: without loading and
    writing."""
    tensors = _tensors(given.model)
    expected = given.weights().keys()
    if weights.keys() != expected:
        raise SystemExit(f"the peer left out or invented {sorted(weights.keys() ^ expected)[:4]}")
    for name, weight in weights.items():
        if weight.shape != tensors[name].shape or not weight.isfinite().all():
            raise SystemExit(f"{name}: {tuple(weight.shape)} for {tuple(tensors[name].shape)}, or not finite")
    made = {name: weights.get(name, tensor).float().contiguous() for name, tensor in tensors.items()}
    given.output.mkdir(parents=True, exist_ok=True)
    save_file(made, given.output / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((given.model / "config.json").read_text())
    (given.output / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n")
    for path in given.model.glob("*token*.json"):
        shutil.copy(path, given.output)
    tell(given, package, bits=bits, seconds=seconds, notes=notes, **more)


def _tensors(model: Path) -> dict[str, torch.Tensor]:
    return load_file(model / WEIGHTS)


def _quantized(name: str) -> bool:
    return ".layers." in name and name.endswith("_proj.weight")
