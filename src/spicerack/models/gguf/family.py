"""`Family`: what a family of transformers is called in GGUF files, as data, one file each in `families/`.

GGUF has names of its own for modules (`blk.3.attn_q`) and for what config.json says (`llama.block_count`), and
llama.cpp computes each architecture in one way: what a config could ask for beside that is refused by name. Facts are
those of llama.cpp's converter and loaders (llama-cpp-python 0.3.36: `conversion/`, `src/models/`) and of gguf-py 0.19.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from spicerack import plugins
from spicerack.errors import CheckpointError

PACKAGE = "models.gguf.families"
Kind = Literal["u32", "f32", "bool", "string"]
Rows = Literal["queries", "keys", "groups"]
"""Orders of rows that differ: llama's rotary halves are interleaved by head ("queries", "keys": as many heads as these
have), falcon's q, k and v lie together by group of heads ("groups")."""


@dataclass(frozen=True, slots=True)
class Key:
    """One entry of config.json that has a key of its own in a GGUF file.

    config    its key there
    metadata  in the file, behind the architecture and a dot
    kind      of the value in the file
    optional  transformers' class does without it, too
    """

    config: str
    metadata: str
    kind: Kind = "u32"
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Window:
    """Layers of which some look back a bounded number of tokens.

    period   where config and file name no layer, every so manyth layer is the one that looks back all the way
    """

    period: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A family, under both names.

    model_type    transformers' name
    architecture  GGUF's; several families may share one
    classes       of transformers, whose weights a file holds; what is read becomes the first
    prefix        of the model inside a class with a head; checkpoints have it or not
    modules       module of a checkpoint -> of a file. `{i}` stands for the block, `{e}` for one of those that a file
                  has stacked in one tensor. Of several modules that are the same in a file the first is what is read
    tensors       tensor of a checkpoint, its whole name -> those of a file, of what is no module's: experts in one
                  tensor, and parameters. Where a file has several, the rows of the checkpoint's lie in them
    alternating   these rows are dealt to them one by one; else each has as many that lie behind each other
    keys          entries of config.json, each for itself
    rows          module of a file, its last part -> the order that its rows have there
    plus_one      norms are stored with 1 added, as llama.cpp multiplies by them
    transposed    modules of a file, the last part, whose weight a checkpoint stores [.., K, N]
    rope          whether there are rotary embeddings
    truncated     yarn's ramp begins and ends at whole dimensions, unless a config says otherwise: in llama.cpp always
    scalings      how their frequencies may be scaled, as `rope_type` says it, in llama.cpp's code of the architecture
    partial       whether they may turn a part of each head only
    window        of layers that look back a bounded number of tokens
    kinds         kinds of blocks, of a config's `layer_types`, that llama.cpp has where there is no `window`
    fixed         key of config.json -> the values that llama.cpp computes; others are refused
    settings      entries of the config that is read, beside `keys`: what llama.cpp takes for granted
    marks         keys that only this family's files have, of those that share an architecture
    left_out      patterns of names of tensors that a file does not hold, and that no weight of the model needs
    scaled        llama.cpp multiplies all layers by the scale that NVFP4 has beside a tensor
    own_head      llama.cpp wants a head of its own, also where it is the embedding
    encoder       it makes embeddings of texts: not causal, and pooled
    pooler        module of a file that a reader may not have, and that transformers' class has
    refuses       why llama.cpp computes something else for a full config, the end of a sentence; None if it does not
    to_metadata   more keys from the full config
    to_config     more of the config from keys (and names of tensors) of a file
    """

    model_type: str
    architecture: str
    classes: tuple[str, ...]
    prefix: str
    modules: Mapping[str, str]
    keys: tuple[Key, ...]
    tensors: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    alternating: bool = False
    rows: Mapping[str, Rows] = field(default_factory=dict)
    plus_one: bool = False
    transposed: frozenset[str] = frozenset()
    rope: bool = True
    truncated: bool = True
    scalings: tuple[str, ...] = ("linear", "yarn")
    partial: bool = False
    window: Window | None = None
    kinds: tuple[str, ...] = ("full_attention",)
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    marks: tuple[str, ...] = ()
    left_out: tuple[str, ...] = (r".*rotary_emb\.inv_freq",)
    scaled: bool = False
    own_head: bool = False
    encoder: bool = False
    pooler: str | None = None
    refuses: Callable[[Mapping[str, Any]], str | None] = lambda _config: None
    to_metadata: Callable[[Mapping[str, Any]], dict[str, tuple[Kind, Any]]] = lambda _config: {}
    to_config: Callable[[Mapping[str, Any], Collection[str]], dict[str, Any]] = lambda _keys, _names: {}


SIZES = (
    Key("num_hidden_layers", "block_count"),
    Key("max_position_embeddings", "context_length"),
    Key("hidden_size", "embedding_length"),
    Key("intermediate_size", "feed_forward_length"),
    Key("num_attention_heads", "attention.head_count"),
)
"""What nearly all families call the same."""
GROUPED = (*SIZES, Key("num_key_value_heads", "attention.head_count_kv"))
"""The same, where several heads of queries share one of keys."""
RMS = Key("rms_norm_eps", "attention.layer_norm_rms_epsilon", "f32")
HEAD = tuple(Key("head_dim", f"attention.{name}_length", optional=True) for name in ("key", "value"))
"""Where a config says the width of a head, that need not be that of the model by the number of heads."""
SILU = ("silu", "swish")
GELU_TANH = ("gelu_pytorch_tanh", "gelu_new")
_ATTENTION = {
    "model.layers.{i}.self_attn.q_proj": "blk.{i}.attn_q",
    "model.layers.{i}.self_attn.k_proj": "blk.{i}.attn_k",
    "model.layers.{i}.self_attn.v_proj": "blk.{i}.attn_v",
    "model.layers.{i}.self_attn.o_proj": "blk.{i}.attn_output",
}
FRAME = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    **_ATTENTION,
}
"""What surrounds the norms and the MLPs of nearly all decoders."""
NORMS = {
    "model.layers.{i}.input_layernorm": "blk.{i}.attn_norm",
    "model.layers.{i}.post_attention_layernorm": "blk.{i}.ffn_norm",
}
"""Norms in front of attention and of the MLP."""
MLP = {
    "model.layers.{i}.mlp.gate_proj": "blk.{i}.ffn_gate",
    "model.layers.{i}.mlp.up_proj": "blk.{i}.ffn_up",
    "model.layers.{i}.mlp.down_proj": "blk.{i}.ffn_down",
}
QK_NORMS = {
    "model.layers.{i}.self_attn.q_norm": "blk.{i}.attn_q_norm",
    "model.layers.{i}.self_attn.k_norm": "blk.{i}.attn_k_norm",
}
EXPERTS = {
    "model.layers.{i}.mlp.gate": "blk.{i}.ffn_gate_inp",
    "model.layers.{i}.mlp.experts.{e}.gate_proj": "blk.{i}.ffn_gate_exps",
    "model.layers.{i}.mlp.experts.{e}.up_proj": "blk.{i}.ffn_up_exps",
    "model.layers.{i}.mlp.experts.{e}.down_proj": "blk.{i}.ffn_down_exps",
}
DECODER = {**FRAME, **NORMS, **MLP}
"""Llama's names, which most decoders have taken over."""


LLAMA_SCALINGS = ("linear", "yarn", "llama3", "longrope")
"""What llama.cpp's code of llama and granite takes."""


def biases(_keys: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Whether layers have biases, as a llama's config says it, from the names of a file's tensors."""
    return {"attention_bias": "blk.0.attn_q.bias" in names, "mlp_bias": "blk.0.ffn_up.bias" in names}


def of_type(model_type: object) -> Family:
    """The family that transformers calls so. Raises CheckpointError, with the list, for one that is not written."""
    if isinstance(model_type, str) and model_type in plugins.names(PACKAGE):
        family: Family = plugins.get(PACKAGE, model_type, "FAMILY")
        return family
    raise CheckpointError(
        f"models of the family {model_type!r} have no names in GGUF that are known here",
        f"known are {', '.join(plugins.names(PACKAGE))}",
    )


def of_architecture(architecture: str, keys: Collection[str], told: str | None = None) -> Family:
    """The family of a file.

    architecture  as the file has it
    keys          of its metadata, without the architecture in front
    told          transformers' name, where the file says it itself

    Raises CheckpointError, with the list, for an architecture that is not read.
    """
    families: list[Family] = [plugins.get(PACKAGE, name, "FAMILY") for name in plugins.names(PACKAGE)]
    candidates = [family for family in families if family.architecture == architecture]
    if not candidates:
        known = ", ".join(sorted({family.architecture for family in families}))
        raise CheckpointError(f"GGUF files of the architecture {architecture!r} are not read", f"those of {known} are")
    for family in candidates:
        if family.model_type == told:
            return family
    fitting = [family for family in candidates if all(mark in keys for mark in family.marks)]
    return max(fitting or candidates, key=lambda family: len(family.marks))
