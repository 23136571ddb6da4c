"""ExecuTorch on phones, by XNNPACK: its programs are not written here yet."""

from __future__ import annotations

from spicerack.storage.engine import Engine, Limit, Reads

_XNNPACK = "executorch 1.5.1 and torchao 0.18: Int8DynamicActivationIntxWeightConfig, backends/xnnpack"
_LINEAR = frozenset({"linear", "head"})

ENGINE = Engine(
    name="executorch",
    version="1.5.1",
    reads=(
        Reads(
            to="pte",
            checked="torchao's own layers were run here; codes of ours were not",
            written=False,
            limits=(
                Limit(
                    source=_XNNPACK,
                    roles=_LINEAR,
                    integers=True,
                    bits=(4, 8),
                    groups=(None, 32, 64, 128, 256),
                    zero=(),
                    activations=("token",),
                ),
                Limit(source=f"{_XNNPACK}: scales of groups are kept in bfloat16", scales="bfloat16"),
            ),
            remark="what layers are given is rounded to int8, a scale for each token",
        ),
    ),
    usual=("w8", "w8a8"),
)
