"""Tiny random models of every family that the installed transformers has, by rules for all and data for a few.

    families   those that have a class of their own, by the name of their type
    build      a model of one, the same each time, with a few kilobytes of weights and no parameter that is 0 or 1
    inputs     what its forward takes

A config begins as its class makes it, and numbers in it are replaced by their names (`SIZES`); where that contradicts
itself, only what the rules name is set and the class derives the rest; where a family has demands of its own, they are
rows of `oddities.py`.
"""

from __future__ import annotations

import copy
import inspect
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import transformers
from oddities import OVERRIDES
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

VOCABULARY = 300
POSITIONS = 128
SIZES: dict[int, tuple[str, ...]] = {
    VOCABULARY: ("vocab_size", "n_vocab", "padded_vocab_size", "text_vocab_size", "vocab_size_per_layer_input",
                 "pronunciation_vocab_size", "shape_vocab_size", "entity_vocab_size", "unpadded_vocab_size"),
    POSITIONS: (
        "max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "context_length", "max_sequence_length",
        "seq_length", "original_max_position_embeddings",
    ),
    64: (
        "hidden_size", "n_embd", "d_model", "dim", "model_dim", "embedding_size", "word_embed_proj_dim", "lru_width",
        "projection_dim", "vision_hidden_size", "text_hidden_size", "output_dim", "embed_dim", "out_hidden_size",
        "embedding_dim", "dim_model",
    ),
    96: (
        "intermediate_size", "ffn_dim", "d_ff", "n_inner", "intermediate_size_mlp", "encoder_ffn_dim",
        "decoder_ffn_dim", "hidden_dim", "d_inner", "ffn_hidden_size", "dim_ff", "dim_feedforward", "mlp_dim",
        "shared_expert_intermediate_size", "shared_intermediate_size", "dense_intermediate_size",
        "moe_shared_expert_intermediate_size", "prefix_dense_intermediate_size",
    ),
    32: (
        "moe_intermediate_size", "expert_ffn_hidden_size", "expert_intermediate_size", "moe_intermediate",
        "moe_shared_intermediate", "q_lora_rank", "kv_lora_rank", "o_lora_rank", "laurel_rank",
    ),
    16: (
        "head_dim", "d_kv", "kv_channels", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "global_head_dim",
        "qk_head_dim", "attention_head_dim", "attn_head_dim", "attention_head_size", "swa_head_dim", "swa_v_head_dim",
        "sliding_window", "attention_chunk_size", "attention_window_size", "local_attention_window", "state_size",
        "mamba_d_state", "ssm_state_size", "d_state", "mamba_state_dim", "mamba_d_head", "mamba_head_dim",
        "mamba_headdim", "linear_key_head_dim", "linear_value_head_dim", "hidden_size_per_layer_input",
        "index_head_dim",
    ),
    8: ("mamba_n_heads", "mamba_num_heads", "mamba_chunk_size", "chunk_size", "index_topk"),
    4: (
        "num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads",
        "heads", "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts",
        "num_moe_experts", "linear_num_value_heads", "index_n_heads",
    ),
    2: (
        "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers",
        "num_decoder_layers", "num_encoder_layers", "depth", "num_key_value_heads", "kv_n_heads", "num_kv_heads",
        "n_kv_heads", "swa_num_key_value_heads", "num_global_key_value_heads", "num_experts_per_tok", "moe_top_k",
        "top_k_experts", "moe_k", "moe_topk", "num_experts_per_token", "experts_per_token", "linear_num_key_heads",
    ),
    1: (
        "n_group", "topk_group", "n_shared_experts", "num_shared_experts", "moe_num_shared_experts",
        "first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "first_dense_layers", "mamba_n_groups",
        "mamba_ngroups",
    ),
}  # fmt: skip
"""Size -> the keys of configs that get it, unless they are smaller already."""
DIVIDED = (
    "hidden_sizes",
    "embed_dims",
    "embed_dim",
    "neck_hidden_sizes",
    "decoder_hidden_sizes",
    "encoder_hidden_sizes",
)
"""Lists of widths, one for each stage of a network for pictures: a quarter of each, which heads divide as before."""
STAGES = ("depths", "num_encoder_blocks", "depth")
"""Lists of numbers of blocks, one for each stage: one block each."""
MOST_NUMBERS = 12_000_000
"""Of a model that is tiny."""
_SIZE_OF = {key: size for size, keys in SIZES.items() for key in keys}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_KEPT_WHOLE = ("rope_scaling", "rope_parameters", "id2label", "label2id")
_DROPPED = ("transformers_version", "architectures", "_name_or_path", "dtype")
_CLASSES = (
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_CTC_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    modeling_auto.MODEL_MAPPING_NAMES,
)
"""Tables of transformers, type -> class: a family gets the class of the first that has it."""


def families() -> dict[str, tuple[str, ...]]:
    """Type -> classes, the likeliest first, of all types that have one; sorted.

    Types that are a part of another (`qwen2_vl_vision` of `qwen2_vl`) and have no class with a head are left to it.
    """
    chosen: dict[str, list[str]] = {}
    for table in _CLASSES:
        for name, classes in table.items():
            if name in CONFIG_MAPPING:
                chosen.setdefault(name, []).append(classes if isinstance(classes, str) else classes[0])
    bodies = _CLASSES[-1]
    parts = {
        name
        for name, classes in chosen.items()
        if classes == [bodies.get(name)] and any(name.startswith(f"{whole}_") for whole in chosen)
    }
    return {name: tuple(dict.fromkeys(chosen[name])) for name in sorted(chosen.keys() - parts)}


def build(family: str) -> PreTrainedModel:
    """A float32 model in eval mode, of the first class, and by the first way to shrink its config, that work.

    Raises what the first one raised where no tiny model comes about.
    """
    errors: list[Exception] = []
    for shrink in (_small, _named):
        for name in families()[family]:
            try:
                return _built(getattr(transformers, name), config(family, shrink))
            except Exception as error:  # noqa: BLE001  constructors raise what they like; another way is another chance
                errors.append(error)
    raise errors[0]


def _built(cls: type[PreTrainedModel], of: PreTrainedConfig) -> PreTrainedModel:
    """A random model, the same each time. Raises ValueError for one that is not tiny, before it has a weight."""
    with torch.device("meta"):
        size = sum(p.numel() for p in cls(copy.deepcopy(of)).parameters())
    if size > MOST_NUMBERS:
        raise ValueError(f"{size:,} parameters: not tiny")
    torch.manual_seed(0)
    model = cls(of).float().eval()
    _fill(model)
    return model


def config(family: str, shrink: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]) -> PreTrainedConfig:
    """Its config, smaller."""
    cls = CONFIG_MAPPING[family]
    base = {key: value for key, value in cls().to_dict().items() if key not in (*_DROPPED, "model_type")}
    return cls(**shrink(base, copy.deepcopy(OVERRIDES.get(family, {}))))


def _small(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The whole of a config, with smaller numbers; `own` goes first."""
    small: dict[str, Any] = {}
    for key, value in base.items():
        if key == "layer_types" and isinstance(value, list):
            kinds = list(dict.fromkeys(value))
            layers = own.get("num_hidden_layers", 2)
            small[key] = (kinds + kinds[-1:] * layers)[:layers]
        elif isinstance(value, dict) and key not in _KEPT_WHOLE:
            small[key] = _small(value, own[key] if isinstance(own.get(key), dict) else {})
        else:
            small[key] = _shrunk(key, value)
    return _joined(small, own)


def _named(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """What the rules name and nothing else, so that lists and sums are derived again by the class."""
    small: dict[str, Any] = {}
    for key, value in base.items():
        if isinstance(value, dict) and ("model_type" in value or key.endswith("_config")):
            kind = {"model_type": value["model_type"]} if "model_type" in value else {}
            small[key] = kind | _named(value, own[key] if isinstance(own.get(key), dict) else {})
        elif _shrunk(key, value) != value or (key in _SIZE_OF and isinstance(value, int)):
            small[key] = _shrunk(key, value)
    return _joined(small, own)


def _shrunk(key: str, value: Any) -> Any:
    """One entry of a config, smaller where its name says what it is."""
    if key in _SIZE_OF and isinstance(value, int | float) and not isinstance(value, bool):
        return min(_SIZE_OF[key], value) if key != "vocab_size" else VOCABULARY
    if isinstance(value, list | tuple) and value and all(isinstance(item, int) for item in value):
        if key in DIVIDED:
            return [item // 4 for item in value]
        if key in STAGES:
            return [1] * len(value)
    if key in _TOKENS and isinstance(value, list):
        return _TOKENS[key]
    if key.endswith("_token_id") and isinstance(value, int) and value >= VOCABULARY:
        return _TOKENS.get(key, VOCABULARY - 1 - zlib.crc32(key.encode()) % 7)
    return value


def _joined(small: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """With the family's own entries; latent attention has as many heads for keys as for queries."""
    if small.get("kv_lora_rank") and "num_key_value_heads" in small:
        small["num_key_value_heads"] = small.get("num_attention_heads", 4)
    return small | {k: v for k, v in own.items() if not (isinstance(v, dict) and isinstance(small.get(k), dict))}


def _fill(model: nn.Module) -> None:
    """Moves biases, norms, gates and running statistics, which constructors leave at 0 or 1: a tensor that is lost or
    takes another's place is seen then."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not p.is_floating_point():
                continue
            noise = 0.05 * torch.randn(p.shape, generator=draw)
            if p.ndim >= 2:
                if not torch.isfinite(p).all() or p.std() < 1e-4:
                    p.copy_(noise)
            elif name.rpartition(".")[2] not in ("A_log", "dt_bias", "D"):  # decays of a recurrence
                p.copy_(p + noise if torch.isfinite(p).all() else noise)
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.add_(0.1 * torch.randn(b.shape, generator=draw))
            if name.endswith("running_var"):
                b.mul_(1 + 0.3 * torch.rand(b.shape, generator=draw))


def inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Random ones of one example that the forward takes, by their names; texts have 20 tokens."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 200, (1, 20), generator=draw)
    takes = inspect.signature(model.forward).parameters
    main = model.main_input_name
    given: dict[str, torch.Tensor] = {}
    if "input_ids" in takes:
        given["input_ids"] = ids
    if main != "input_ids" or "input_ids" not in takes or "pixel_values" in _required(takes):
        given |= {name: values for name, values in _signals(model, draw) if name in takes}
    if model.config.is_encoder_decoder and "decoder_input_ids" in takes:
        given["decoder_input_ids"] = ids[:, :9]
    return given


def _required(takes: Mapping[str, inspect.Parameter]) -> set[str]:
    """Arguments without a default."""
    return {name for name, parameter in takes.items() if parameter.default is parameter.empty}


def _signals(model: PreTrainedModel, draw: torch.Generator) -> Iterator[tuple[str, torch.Tensor]]:
    """Pictures and sounds of the sizes that a config names, or common ones."""
    of = model.config
    vision = getattr(of, "vision_config", of)
    size, channels = getattr(vision, "image_size", 32), getattr(vision, "num_channels", 3)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    yield "pixel_values", torch.randn((1, channels, int(height), int(width)), generator=draw)
    frames = getattr(of, "num_frames", 4)
    yield "pixel_values_videos", torch.randn((1, frames, channels, int(height), int(width)), generator=draw)
    yield "input_values", torch.randn((1, 4000), generator=draw)
    mels = next(
        (
            getattr(of, k)
            for k in ("num_mel_bins", "input_feat_per_channel", "feature_size", "mel_bins")
            if hasattr(of, k)
        ),
        80,
    )
    yield "input_features", torch.randn((1, int(mels), 100), generator=draw)
