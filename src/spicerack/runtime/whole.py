"""Which parts of a folder's model run as one native call, and why others do not.

Whether that holds is known only once the model is loaded, because its results are compared then; so this loads, where
the model may have such a part at all.
"""

from __future__ import annotations

from pathlib import Path

from spicerack.kernels.kernel import Compute
from spicerack.models.families.encoders import ENCODERS
from spicerack.nn.encoder import obstacles
from spicerack.runtime.folder import Folder
from spicerack.runtime.load import load


def whole_parts(folder: str | Path, compute: Compute | None = None, engine: str | None = None) -> dict[str, str | None]:
    """Path of each encoder in the model ("" for the model itself) -> why its modules run one by one, as the end of a
    sentence, or None where one call computes it.

    Empty for families without such encoders and for float folders, which are not loaded. folder, compute, engine: as in
    `load`, which raises what this raises.
    """
    opened = Folder.open(folder)
    family = str(opened.config.get("model_type", "")).replace("-", "_")
    if opened.format is None or family not in {encoder.file.split(".")[2] for encoder in ENCODERS}:
        return {}
    return obstacles(load(folder, compute=compute, engine=engine))
