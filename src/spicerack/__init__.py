"""spicerack: make AI models smaller and faster by using fewer bits, and prove what that cost.

    small = spicerack.quantize(module, "w8")                          # any torch.nn.Module
    spicerack.quantize("path/to/model", "w4g32z", output="out")       # any Hugging Face safetensors folder
    model = spicerack.load("out")
    model = spicerack.prepare_qat(model, "w2g32h")                    # train it as always, then
    small = spicerack.freeze(model)

The names below are imported on first use; importing the package loads no torch and changes nothing. They are all that
the docs ask anybody to import, but for the exceptions of `spicerack.errors`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from spicerack._version import __version__

if TYPE_CHECKING:
    from spicerack.evaluation.bench import BenchOptions, bench
    from spicerack.evaluation.evaluate import EvaluationOptions, evaluate, measure
    from spicerack.evaluation.language import paired_difference
    from spicerack.exports.export import export, import_model
    from spicerack.exports.survey import formats
    from spicerack.kernels.pool import release_memory
    from spicerack.nn.cache import QuantizedCache
    from spicerack.planning.mix.face import quantize
    from spicerack.runtime.load import load
    from spicerack.runtime.save import save
    from spicerack.text.calibration import Calibration
    from spicerack.text.calibration import read as read_calibration
    from spicerack.training.qat.batchnorm import fold_batchnorm
    from spicerack.training.qat.bitnet import twin_config
    from spicerack.training.qat.prepare import freeze, prepare_qat, scales
    from spicerack.training.qat.start import QATConfig
    from spicerack.training.run import train
    from spicerack.training.settings import Settings

__all__ = [
    "BenchOptions",
    "Calibration",
    "EvaluationOptions",
    "QATConfig",
    "QuantizedCache",
    "Settings",
    "__version__",
    "bench",
    "evaluate",
    "export",
    "fold_batchnorm",
    "formats",
    "freeze",
    "import_model",
    "load",
    "measure",
    "paired_difference",
    "prepare_qat",
    "quantize",
    "read_calibration",
    "release_memory",
    "save",
    "scales",
    "train",
    "twin_config",
]

_HOMES = {
    "BenchOptions": "evaluation.bench.BenchOptions",
    "Calibration": "text.calibration.Calibration",
    "EvaluationOptions": "evaluation.evaluate.EvaluationOptions",
    "QATConfig": "training.qat.start.QATConfig",
    "QuantizedCache": "nn.cache.QuantizedCache",
    "Settings": "training.settings.Settings",
    "bench": "evaluation.bench.bench",
    "evaluate": "evaluation.evaluate.evaluate",
    "export": "exports.export.export",
    "fold_batchnorm": "training.qat.batchnorm.fold_batchnorm",
    "formats": "exports.survey.formats",
    "freeze": "training.qat.prepare.freeze",
    "import_model": "exports.export.import_model",
    "load": "runtime.load.load",
    "measure": "evaluation.evaluate.measure",
    "paired_difference": "evaluation.language.paired_difference",
    "prepare_qat": "training.qat.prepare.prepare_qat",
    "quantize": "planning.mix.face.quantize",
    "read_calibration": "text.calibration.read",
    "release_memory": "kernels.pool.release_memory",
    "save": "runtime.save.save",
    "scales": "training.qat.prepare.scales",
    "train": "training.run.train",
    "twin_config": "training.qat.bitnet.twin_config",
}
"""Name on the face -> where it lives, and what it is called there."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'spicerack' has no attribute {name!r}")
    module, _, attribute = _HOMES[name].rpartition(".")
    return vars(import_module(f"spicerack.{module}"))[attribute]


def __dir__() -> list[str]:
    return sorted(__all__)
