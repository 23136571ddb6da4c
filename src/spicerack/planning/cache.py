"""What a model keeps of the tokens it has read: bytes by each engine's rules, layer by layer, from config.json alone.

A layer keeps keys and values of all tokens, of the last ones in its window, one compressed vector (MLA), nothing
(a cache that is shared with a layer before), or a state that does not grow (linear attention, state spaces). So no
model is asked for one number: what multiplies layers, heads and width is wrong by 1.3 to 25 times on models of 2026.

The rules are those of transformers 5.24 (checked on the meta device), llama.cpp b11549 (checked by its own run without
allocation) and vLLM 0.33 (its source).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from spicerack.errors import CheckpointError
from spicerack.planning.anatomy.fields import MOST_LAYERS, Fields, text_of
from spicerack.planning.anatomy.kinds import Kind, kinds

Rule = Literal["transformers", "spicerack", "llama.cpp", "vllm", "mlx", "preallocated"]
"""transformers   grows with what is used; a window keeps one token less than it is long
spicerack      the same; in 8 or 4 bits whole segments of 32 tokens are packed, and the last 32 and more stay in float
llama.cpp      all of the context at once, in cells of 256, a cache for each sequence, as the server has them that is
               told how many there are; a window keeps its batch besides; states are float32
vllm           blocks of 16; a window keeps the tokens in flight besides
mlx            grows in steps of 256
preallocated   all of the context at once, windows too (onnxruntime's shared buffer)"""

_SEGMENT, _RESIDUAL = 32, 32
"""Tokens of a segment of our cache, also channels that share a scale, and tokens that always stay in float: those of
`nn.cache_segments`, which a test compares."""
_IGNORED_BY_LLAMA_CPP = frozenset({"mistral", "mixtral"})
"""Families whose window it does not read."""


@dataclass(frozen=True, slots=True)
class Layer:
    """What one layer keeps.

    kind      see `kinds`
    keys      elements for each token, those of a sparse index included
    values    the same; none where keys hold both (MLA)
    window    tokens that are looked back at; None for all
    conv      channels of a convolution's state, and `taps` its width
    state     elements of a recurrent state, for each sequence
    crossed   elements for each token of an encoder
    heads     that values are of
    """

    kind: Kind
    keys: int = 0
    values: int = 0
    window: int | None = None
    conv: int = 0
    taps: int = 0
    state: int = 0
    crossed: int = 0
    heads: int = 1


@dataclass(frozen=True, slots=True)
class Room:
    """What a cache has to hold.

    tokens      of the context, of each sequence
    sequences   at once
    bytes       of an element of keys and values: 2 for 16 bits, 34/32 for q8_0, 18/32 for q4_0
    float_bytes of an element of the model's own type, which states of convolutions have
    batch       tokens that are computed together
    source      tokens of an encoder
    """

    tokens: int
    sequences: int = 1
    bytes: float = 2.0
    float_bytes: float = 2.0
    batch: int = 512
    source: int = 0


def layers(config: Mapping[str, Any]) -> list[Layer]:
    """What each layer of the decoder keeps, first to last.

    config: the whole of config.json. Raises CheckpointError, naming them, for missing fields and unknown types.
    """
    text = text_of(config)
    fields = Fields(text, str(text.get("model_type", config.get("model_type"))))
    if config.get("is_encoder_decoder"):
        return _crossing(fields)
    named = kinds(text)
    attends = any(kind not in ("linear", "none") for kind in named)
    keys, values, heads = _attention(fields) if attends else (0, 0, 1)
    full_keys, full_values, full_heads = _global(fields, keys, values, heads)
    conv, taps, state = _recurrence(fields) if {"linear", "hybrid"} & set(named) else (0, 0, 0)
    windows: dict[Kind, str] = {"sliding": "sliding_window", "chunked": "attention_chunk_size"}
    kept = []
    for kind in named:
        if kind == "full":
            kept.append(Layer(kind, full_keys, full_values, heads=full_heads))
        elif kind in windows:
            kept.append(Layer(kind, keys, values, fields.size(windows[kind]), heads=heads))
        elif kind == "hybrid":
            kept.append(Layer(kind, keys, values, None, conv, taps, state, heads=heads))
        elif kind == "linear":
            kept.append(Layer(kind, conv=conv, taps=taps, state=state))
        else:
            kept.append(Layer(kind))
    return kept


def _attention(c: Fields) -> tuple[int, int, int]:
    """Elements of keys and of values that a token adds to a layer, and heads that they are of.

    Those of a sparse index are among the keys.
    """
    index = c.get("index_head_dim") or 0
    # one vector holds both, and the part that turns with positions; the heads of config.json are unfolded from it
    if c.get("kv_lora_rank"):
        return c.size("kv_lora_rank") + index, c.size("qk_rope_head_dim"), 1
    single = c.get("multi_query") and not c.get("new_decoder_architecture")  # Falcon, BigCode: one for all queries
    heads = 1 if single else c.kv_heads
    width = c.size("head_dim", "d_kv", "kv_channels", default=c.hidden // c.heads)
    return heads * width + index, heads * c.size("v_head_dim", default=width), heads


def _global(c: Fields, keys: int, values: int, heads: int) -> tuple[int, int, int]:
    """The same of layers that look at everything, which are wider in Gemma 4."""
    if not c.get("global_head_dim"):
        return keys, values, heads
    wide = c.size("num_global_key_value_heads", default=c.kv_heads)
    full = wide * c.size("global_head_dim")
    return full, 0 if c.flag("attention_k_eq_v") else full, wide


def _recurrence(c: Fields) -> tuple[int, int, int]:
    """Channels and width of a convolution's state, and elements of the recurrent one."""
    family = str(c.get("model_type"))
    if c.get("linear_num_value_heads"):  # gated delta net
        keys = c.size("linear_num_key_heads") * c.size("linear_key_head_dim")
        values = c.size("linear_num_value_heads") * c.size("linear_value_head_dim")
        return 2 * keys + values, c.size("linear_conv_kernel_dim"), values * c.size("linear_key_head_dim")
    if isinstance(c.get("linear_attn_config"), dict):  # Kimi
        own = Fields(c.get("linear_attn_config"), "kimi_linear")
        heads, width = own.size("num_heads"), own.size("head_dim")
        return 3 * heads * width, own.size("short_conv_kernel_size"), heads * width**2
    if c.get("conv_L_cache"):  # LFM2
        return c.hidden, c.size("conv_L_cache"), 0
    if c.get("mamba_n_heads") or c.get("mamba_num_heads"):
        heads, width = c.size("mamba_n_heads", "mamba_num_heads"), c.get("mamba_d_head") or c.get("mamba_head_dim")
        inner = heads * width if isinstance(width, int) else c.size("mamba_expand") * c.hidden
        state = c.size("mamba_d_state", "ssm_state_size")
        groups = c.size("mamba_n_groups", "n_groups", default=1)
        return inner + 2 * groups * state, c.size("mamba_d_conv", "conv_kernel"), inner * state
    if family == "mamba2":
        inner, state = c.size("num_heads") * c.size("head_dim"), c.size("state_size")
        return inner + 2 * c.size("n_groups", default=1) * state, c.size("conv_kernel"), inner * state
    if c.get("state_size") or c.get("mamba_d_state"):
        state = c.size("state_size", "mamba_d_state")
        inner = c.size("intermediate_size") if family == "mamba" else c.size("mamba_expand", default=2) * c.hidden
        return inner, c.size("conv_kernel", "mamba_d_conv"), inner * state
    if family == "rwkv":  # the last token twice, and three numbers for each channel
        return 2 * c.hidden, 1, 3 * c.hidden
    if family.startswith("minimax"):
        width = c.size("head_dim", default=c.hidden // c.heads)
        return 0, 0, c.heads * width**2
    raise CheckpointError(
        f"config.json of the family {family} has linear layers, and no sizes of their states",
        "give the model's own config.json",
    )


def _crossing(c: Fields) -> list[Layer]:
    """Layers of a decoder that reads an encoder: its own keys and values, and those of the encoder's tokens."""
    heads = c.size("decoder_attention_heads", "num_heads", "num_attention_heads")
    width = heads * c.size("d_kv", default=c.hidden // heads)
    count = c.size("decoder_layers", "num_decoder_layers", "num_layers", most=MOST_LAYERS)
    return [Layer("full", width, width, crossed=2 * width, heads=heads) for _ in range(count)]


def nbytes(layer: Layer, room: Room, rule: Rule, family: str) -> float:
    """Bytes that a layer keeps under an engine's rule. family: model_type of the language model.

    Under the rule of spicerack `room.bytes` below those of the model's floats are bits / 8, of codes alone.
    """
    if rule == "spicerack" and room.bytes < room.float_bytes and not layer.state and not layer.conv:
        return room.sequences * _packed(layer, room) + layer.crossed * room.bytes * room.source * room.sequences
    tokens, sequences = _tokens(layer, room, rule, family), room.sequences
    kept = (layer.keys + layer.values) * room.bytes * tokens * sequences
    crossed = layer.crossed * room.bytes * room.source * sequences
    taps = layer.taps if rule in ("transformers", "spicerack", "preallocated") else max(layer.taps - 1, 0)
    conv = layer.conv * taps * (4 if rule == "llama.cpp" else room.float_bytes)
    return kept + crossed + sequences * (conv + layer.state * 4)


def _tokens(layer: Layer, room: Room, rule: Rule, family: str) -> int:
    """Tokens that a layer has room for."""
    tokens, window = room.tokens, layer.window
    if rule == "transformers":
        return tokens if window is None else min(tokens, window - 1)
    if rule == "spicerack":  # transformers' own, as it lies in memory: the window is a view of one token more
        return tokens if window is None else min(tokens, window)
    if rule == "llama.cpp":
        tokens = _up(tokens, 256)
        if window is None or family in _IGNORED_BY_LLAMA_CPP:
            return tokens
        return _up(min(tokens, window + room.batch), 256)
    if rule == "vllm":
        if layer.kind == "sliding" and window is not None:
            return min(_up(tokens, 16), _up(min(window - 1 + room.batch, tokens), 16) + 16)
        if window is not None:
            return min(_up(tokens, 16), _up(min(window + room.batch, tokens), 16))
        return _up(tokens, 16)
    if rule == "mlx":
        return _up(tokens if window is None else min(tokens, window), 256)
    return tokens


def _packed(layer: Layer, room: Room) -> float:
    """Bytes of one sequence in our cache of few bits: codes, two float16 for the 32 tokens of a channel of keys and for
    32 channels of a token's values, and tokens in float behind them.

    A window keeps the segments that reach into it, and where none does the last tokens alone.
    """
    tokens = room.tokens
    packed = max(tokens - _RESIDUAL, 0) // _SEGMENT * _SEGMENT
    if layer.window is not None:
        gone = max(tokens - (layer.window - 1), 0)
        dropped = min(gone // _SEGMENT * _SEGMENT, packed)
        packed, tokens = packed - dropped, tokens - dropped
        tokens = tokens if packed else min(tokens, layer.window - 1)
    width = layer.values // layer.heads
    groups = layer.values // _SEGMENT if width % _SEGMENT == 0 else layer.heads
    codes = (layer.keys + layer.values) * room.bytes
    scales = 4 * (layer.keys / _SEGMENT + groups)
    return packed * (codes + scales) + (tokens - packed) * (layer.keys + layer.values) * room.float_bytes


def _up(tokens: int, step: int) -> int:
    """The next multiple."""
    return -(-tokens // step) * step
