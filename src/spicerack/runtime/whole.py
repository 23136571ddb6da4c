"""Which parts of a folder's model run as one native call, and why others do not.

Whether that holds is known only once the model is loaded, because its results are compared then; so this loads, where
the model may have such a part at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spicerack.kernels.kernel import Compute
from spicerack.models.families.encoders import ENCODERS
from spicerack.nn.encoder.whole import obstacles
from spicerack.runtime.folder import Folder
from spicerack.runtime.load import load


def whole_parts(folder: str | Path, compute: Compute | None = None, engine: str | None = None) -> dict[str, str | None]:
    """Path of each encoder in the model ("" for the model itself) -> why its modules run one by one, as the end of a
    sentence, or None where one call computes it.

    Empty for families without such encoders and for float folders, which are not loaded. folder, compute, engine: as in
    `load`, which raises what this raises.
    """
    opened = Folder.open(folder)
    if opened.format is None or not _families(opened.config) & {encoder.file.split(".")[2] for encoder in ENCODERS}:
        return {}
    return obstacles(load(folder, compute=compute, engine=engine))


def _families(config: Mapping[str, Any]) -> set[str]:
    """The families of the model and of the models in it, as transformers calls their folders."""
    inner = [value for value in config.values() if isinstance(value, Mapping)]
    own = str(config.get("model_type", "")).replace("-", "_").removesuffix("_vision_model")
    return {own}.union(*map(_families, inner))
