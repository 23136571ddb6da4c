"""Rotary embeddings: `rope_parameters` of transformers' config, and keys and tensors of GGUF, both ways.

    default    nothing but the base
    linear     rope.scaling.type, rope.scaling.factor
    yarn       the same, and the context that it was trained with. llama.cpp multiplies scores by 1 + 0.1 ln(factor) of
               its own accord and by rope.scaling.attn_factor on top of that; transformers' attention_factor is the
               product
    llama3     the tensor rope_freqs.weight, by which llama.cpp divides frequencies
    longrope   the tensors rope_factors_long.weight and rope_factors_short.weight, and rope.scaling.attn_factor

llama.cpp chooses LongRoPE's factors by the context that it was started with, transformers by the length of a text:
where a short text is read in a large context, the two differ.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from spicerack.errors import CheckpointError
from spicerack.models.gguf.family import Family, Kind
from spicerack.storage.gguf.metadata import Metadata

FREQUENCIES, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
TENSORS = (FREQUENCIES, LONG, SHORT)
"""Tensors of a file that are no weights: what a config says in numbers."""
PARAMETERS = "spicerack.rope_parameters"
"""Our own key: what `FREQUENCIES` was made from, and what no key of a file says, as JSON."""
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What all releases of Llama 3.1 to 3.3 have but for the factor: a file of others does not say it."""
_TOLERANCE = 1e-5
"""Relative; that of factors which were computed in float32 in another order."""
_YARN_BETAS = {"beta_fast": 32, "beta_slow": 1}
"""The only ones that llama.cpp has for these architectures."""
_TRUNCATE = "truncate"
"""Whether yarn's ramp begins and ends at whole dimensions: in transformers unless a config says otherwise, in llama.cpp
always (ggml_rope_yarn_corr_dims)."""


@dataclass(frozen=True, slots=True)
class Written:
    """What a file says of rotary embeddings.

    keys     key behind the architecture -> kind and value
    tensors  name -> its numbers
    own      keys of spicerack's own
    """

    keys: dict[str, tuple[Kind, Any]] = field(default_factory=dict)
    tensors: dict[str, np.ndarray[Any, np.dtype[np.float32]]] = field(default_factory=dict)
    own: dict[str, str] = field(default_factory=dict)


def head_dim(config: Mapping[str, Any]) -> int:
    """Width of a head. config: transformers' full one."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def obstacle(family: Family, config: Mapping[str, Any]) -> str | None:
    """Why llama.cpp does not turn heads as the config says, the end of a sentence; None if it does.

    config: transformers' full one.
    """
    if not family.rope:
        return None
    full, sliding = _parameters(config)
    kind = str(full.get("rope_type", "default"))
    if kind != "default" and kind not in family.scalings:
        return f"its rotary embeddings are scaled by {kind!r}, which llama.cpp does not have for {family.architecture}"
    if sliding.get("rope_type", "default") != "default":
        return "those of its sliding windows are scaled, which llama.cpp does not do"
    if kind == "yarn":
        for key, usual in _YARN_BETAS.items():
            if full.get(key) not in (None, usual):
                return f"its yarn has {key} {full[key]}, and llama.cpp has {usual}"
        if family.truncated and not full.get(_TRUNCATE, True):
            return "its yarn has truncate False, and llama.cpp has True"
        if full.get("mscale") is not None or full.get("mscale_all_dim") is not None or full.get("factor") is None:
            return "its yarn scales scores in another way than llama.cpp"
    if float(full.get("partial_rotary_factor", 1.0)) != 1.0 and not family.partial:
        return f"they turn a part of each head, and llama.cpp turns all of it in {family.architecture}"
    return None


def note(family: Family, config: Mapping[str, Any]) -> str | None:
    """What llama.cpp computes a little otherwise in every model of a family, a sentence; None if it does not.

    config: transformers' full one.
    """
    full = _parameters(config)[0] if family.rope else {}
    if full.get("rope_type") != "yarn" or full.get(_TRUNCATE, True):
        return None
    return (
        "llama.cpp begins and ends the ramp of yarn at whole dimensions, and the config says truncate false: some "
        "frequencies of its rotary embeddings are a little others, as they are in every such file"
    )


def to_metadata(family: Family, config: Mapping[str, Any]) -> Written:
    """What a file says of a config without an `obstacle`; config: transformers' full one."""
    written = Written()
    if not family.rope:
        return written
    full, sliding = _parameters(config)
    width = int(head_dim(config) * float(full.get("partial_rotary_factor", 1.0)))
    written.keys["rope.dimension_count"] = "u32", width
    written.keys["rope.freq_base"] = "f32", float(full["rope_theta"])
    if sliding:
        written.keys["rope.freq_base_swa"] = "f32", float(sliding["rope_theta"])
    kind = full.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        written.keys["rope.scaling.type"] = "string", kind
        written.keys["rope.scaling.factor"] = "f32", float(full["factor"])
    if kind == "yarn":
        written.keys["rope.scaling.original_context_length"] = "u32", full["original_max_position_embeddings"]
        if full.get("attention_factor") is not None:
            own = float(full["attention_factor"]) / _yarn_scale(float(full["factor"]))
            written.keys["rope.scaling.attn_factor"] = "f32", own
        if full.get(_TRUNCATE, True) != family.truncated:
            written.own[PARAMETERS] = json.dumps(full, sort_keys=True)
    if kind == "llama3":
        written.tensors[FREQUENCIES] = _llama3(full, width)
        written.own[PARAMETERS] = json.dumps(full, sort_keys=True)
    if kind == "longrope":
        written.keys["rope.scaling.type"] = "string", kind
        original = full.get("original_max_position_embeddings") or config["original_max_position_embeddings"]
        written.keys["rope.scaling.original_context_length"] = "u32", original
        written.keys["rope.scaling.attn_factor"] = "f32", _longrope_scale(full, config, original)
        written.tensors[LONG] = np.asarray(full["long_factor"], np.float32)
        written.tensors[SHORT] = np.asarray(full["short_factor"], np.float32)
    return written


def to_config(
    family: Family, metadata: Metadata, tensors: Mapping[str, np.ndarray[Any, Any]], width: int
) -> dict[str, Any]:
    """`rope_parameters`, and what else of a config.json is about them, from a file.

    tensors: those of `TENSORS` that the file has. width: of a head. Raises CheckpointError for what transformers has
    no name for.
    """
    if not family.rope:
        return {}
    at = f"{family.architecture}.rope."
    full: dict[str, Any] = {"rope_theta": decimal(metadata.number(at + "freq_base", 10000.0)), "rope_type": "default"}
    config: dict[str, Any] = {}
    turned = metadata.integer(at + "dimension_count", width)
    if family.partial and 0 < turned <= width:
        full["partial_rotary_factor"] = turned / width
    elif turned != width:
        raise CheckpointError(
            f"{metadata.where}: {at}dimension_count is {turned}, heads have {width}", "convert it anew"
        )
    kind = metadata.text(at + "scaling.type", "linear")
    factor = decimal(metadata.number(at + "scaling.factor", metadata.number(at + "scale_linear", 1.0)))
    attention = decimal(metadata.number(at + "scaling.attn_factor", 1.0))
    original = metadata.integer(
        at + "scaling.original_context_length", metadata.integer(f"{family.architecture}.context_length")
    )
    if LONG in tensors or SHORT in tensors or kind == "longrope":
        if LONG not in tensors or SHORT not in tensors:
            raise CheckpointError(f"{metadata.where}: LongRoPE without {LONG} and {SHORT}", "convert it anew")
        full |= {
            name: [decimal(x) for x in tensors[key]] for name, key in (("long_factor", LONG), ("short_factor", SHORT))
        }
        full |= {"rope_type": "longrope", "attention_factor": attention, "original_max_position_embeddings": original}
        config["original_max_position_embeddings"] = original
    elif FREQUENCIES in tensors:
        full |= _told_llama3(metadata, tensors[FREQUENCIES], full, turned)
    elif kind == "yarn":
        full |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        if attention != 1.0:
            full["attention_factor"] = attention * _yarn_scale(factor)
        if not family.truncated and not _told_truncate(metadata):
            full[_TRUNCATE] = False
    elif kind == "linear" and factor != 1.0:
        full |= {"rope_type": "linear", "factor": factor}
    elif kind not in ("linear", "none"):
        raise CheckpointError(f"{metadata.where}: {at}scaling.type is {kind!r}, which is not read", "convert it anew")
    config["rope_parameters"] = full
    if family.window is not None and at + "freq_base_swa" in metadata:
        sliding = {"rope_theta": decimal(metadata.number(at + "freq_base_swa")), "rope_type": "default"}
        config["rope_parameters"] = {"full_attention": full, "sliding_attention": sliding}
    return config


def _told_truncate(metadata: Metadata) -> bool:
    """Whether a file of ours says that yarn is truncated, of a family where it is not. Raises CheckpointError."""
    if PARAMETERS not in metadata:
        return False
    try:
        return bool(json.loads(metadata.text(PARAMETERS)).get(_TRUNCATE, True))
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{metadata.where}: {PARAMETERS} is damaged", "convert it anew") from error


def decimal(value: float) -> float:
    """The shortest number that is `value` in float32, which is what a config said before it was stored in that."""
    return float(str(np.float32(value)))


def _parameters(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Those of blocks that look back all the way, and of those that do not; the latter empty where all are alike."""
    both = dict(config.get("rope_parameters") or {})
    if "full_attention" in both:
        return dict(both["full_attention"]), dict(both.get("sliding_attention") or {})
    return both, {}


def _yarn_scale(factor: float) -> float:
    """What llama.cpp multiplies scores by, and transformers where nothing is said (YaRN, section 3.4)."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def _longrope_scale(full: Mapping[str, Any], config: Mapping[str, Any], original: int) -> float:
    """What transformers multiplies scores by: what the config says, else by how far contexts are stretched."""
    if full.get("attention_factor") is not None:
        return float(full["attention_factor"])
    factor = float(full.get("factor") or config["max_position_embeddings"] / original)
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def _llama3(parameters: Mapping[str, Any], width: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """What Llama 3.1 divides frequencies by: long waves by `factor`, short ones by 1, those between by something
    between.

    width: how much of a head turns.
    """
    low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
    waves = 2 * math.pi * float(parameters["rope_theta"]) ** (np.arange(0, width, 2, dtype=np.float64) / width)
    # how much of a frequency is kept as it is, from none at the longest waves to all at the shortest
    kept = np.clip((float(parameters["original_max_position_embeddings"]) / waves - low) / (high - low), 0, 1)
    return (1 / ((1 - kept) / float(parameters["factor"]) + kept)).astype(np.float32)


def _told_llama3(
    metadata: Metadata, frequencies: np.ndarray[Any, Any], full: Mapping[str, Any], width: int
) -> dict[str, Any]:
    """The parameters that these factors were made from: what the file says, else those of Llama's releases.

    Raises CheckpointError where neither makes the factors that the file has.
    """
    candidates = [{**_LLAMA3, "factor": decimal(frequencies.max(initial=1.0))}]
    if PARAMETERS in metadata:
        try:
            told = json.loads(metadata.text(PARAMETERS))
            candidates.insert(0, {key: float(told[key]) for key in candidates[0]})
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{metadata.where}: {PARAMETERS} is damaged", "convert it anew") from error
    for candidate in candidates:
        sound = candidate["high_freq_factor"] != candidate["low_freq_factor"] and candidate["factor"] > 0
        if sound and frequencies.size == width // 2:
            made = _llama3({**full, **candidate}, width)
            if np.allclose(made, frequencies, rtol=_TOLERANCE, atol=0):
                original = int(candidate["original_max_position_embeddings"])
                return {**candidate, "rope_type": "llama3", "original_max_position_embeddings": original}
    raise CheckpointError(
        f"{metadata.where}: {FREQUENCIES} has factors that are not Llama 3's, and transformers has no name for them",
        "start from the safetensors folder",
    )
