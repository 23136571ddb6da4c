"""spicerack: make AI models smaller and faster by using fewer bits, and prove what that cost.

    small = spicerack.quantize(module, "w8")                          # any torch.nn.Module
    spicerack.quantize("path/to/model", "w4g32z", output="out")       # any Hugging Face safetensors folder
    model = spicerack.load("out")
    model = spicerack.prepare_qat(model, "w2g32h")                    # train it as always, then
    small = spicerack.freeze(model)

The names below are imported on first use; importing the package loads no torch and changes nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from spicerack._version import __version__

if TYPE_CHECKING:
    from spicerack.evaluation.evaluate import evaluate
    from spicerack.quantization.run import quantize
    from spicerack.runtime.load import load
    from spicerack.runtime.save import save
    from spicerack.training.qat.prepare import freeze, prepare_qat
    from spicerack.training.qat.start import QATConfig
    from spicerack.training.run import train
    from spicerack.training.settings import Settings

__all__ = [
    "QATConfig",
    "Settings",
    "__version__",
    "evaluate",
    "freeze",
    "load",
    "prepare_qat",
    "quantize",
    "save",
    "train",
]

_HOMES = {
    "QATConfig": "training.qat.start",
    "Settings": "training.settings",
    "evaluate": "evaluation.evaluate",
    "freeze": "training.qat.prepare",
    "load": "runtime.load",
    "prepare_qat": "training.qat.prepare",
    "quantize": "quantization.run",
    "save": "runtime.save",
    "train": "training.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'spicerack' has no attribute {name!r}")
    return vars(import_module(f"spicerack.{_HOMES[name]}"))[name]


def __dir__() -> list[str]:
    return sorted(__all__)
