"""vLLM on CUDA: folders of compressed-tensors, GPTQ and AWQ, multiplied by Marlin or in int8. Its source was read; it
does not run here (no build for CPUs on the index)."""

from __future__ import annotations

from spicerack.storage.engine import Engine, Limit, Reads, Tie

_ROOM = "vLLM 0.33: vllm/model_executor/layers/quantization"
_MARLIN = f"{_ROOM}/utils/marlin_utils.py"
_GROUPS = (None, 32, 64, 128)
_TILE = (64, 128)
"""GPTQ_MARLIN_MIN_THREAD_N rows, GPTQ_MARLIN_MIN_THREAD_K columns."""
_READ = "its source was read; not run here"

ENGINE = Engine(
    name="vllm",
    version="0.33.0",
    reads=(
        Reads(
            to="compressed-tensors",
            checked=_READ,
            limits=(
                Limit(
                    source=f"{_ROOM}/compressed_tensors/compressed_tensors.py: layers derived from LinearBase alone",
                    roles=frozenset({"linear"}),
                ),
                Limit(
                    source=f"{_ROOM}/compressed_tensors/schemes/compressed_tensors_w8a8_int8.py",
                    activations=("token", "static"),
                ),
                Limit(
                    source=f"{_MARLIN}: MARLIN_SUPPORTED_GROUP_SIZES, query_marlin_supported_quant_types, "
                    "verify_marlin_supports_shape; other widths need the package Humming",
                    schemes=("w8a8", "w8a8s"),
                    bits=(4, 8),
                    groups=_GROUPS,
                    zero=(4,),
                    multiple=_TILE,
                ),
            ),
        ),
        Reads(
            to="gptq",
            checked=_READ,
            limits=(
                Limit(source=f"{_ROOM}/gptq_marlin.py: (4, sym) and (8, sym)", bits=(4, 8), zero=()),
                Limit(source=_MARLIN, groups=_GROUPS, multiple=_TILE),
                Limit(source=f"{_ROOM}/gptq_marlin.py", roles=frozenset({"linear", "head"})),
            ),
        ),
        Reads(
            to="awq",
            checked=_READ,
            limits=(
                Limit(source=f"{_ROOM}/awq_marlin.py", roles=frozenset({"linear"}), bits=(4,)),
                Limit(source=_MARLIN, groups=_GROUPS, multiple=_TILE),
            ),
        ),
    ),
    ties=(
        Tie("inputs", f"{_ROOM}/compressed_tensors/utils.py: shards of a fused layer must have one scheme"),
        Tie("experts", f"{_ROOM}/compressed_tensors/compressed_tensors_moe.py: one scheme for a FusedMoE"),
    ),
    usual=("w4g128", "w8a8", "w8"),
)
