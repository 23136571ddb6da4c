"""Towers for pictures, as the tensors that checkpoints have for them.

Each is called with the tower's own config, the width of the language model and the prefix of its names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spicerack.planning.anatomy.fields import MOST_LAYERS, Fields
from spicerack.planning.anatomy.parts import Part, Tensor, linear, norm


def siglip(config: Mapping[str, Any], hidden: int, prefix: str) -> Part:
    """Gemma 3's tower and projector."""
    c = Fields(config, "siglip_vision_model")
    at, width, patch = f"{prefix}vision_tower.vision_model.", c.hidden, c.size("patch_size")
    yield Tensor(f"{at}embeddings.patch_embedding.weight", (width, c.size("num_channels", default=3), patch, patch))
    yield Tensor(f"{at}embeddings.patch_embedding.bias", (width,))
    yield Tensor(f"{at}embeddings.position_embedding.weight", ((c.size("image_size") // patch) ** 2, width))
    for i in range(c.layers):
        block = f"{at}encoder.layers.{i}."
        for name in ("layer_norm1", "layer_norm2"):
            yield from norm(f"{block}{name}", width, bias=True)
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield from linear(f"{block}self_attn.{name}", width, width, bias=True)
        yield from linear(f"{block}mlp.fc1", c.inner, width, bias=True)
        yield from linear(f"{block}mlp.fc2", width, c.inner, bias=True)
    yield from norm(f"{at}post_layernorm", width, bias=True)
    yield Tensor(f"{prefix}multi_modal_projector.mm_input_projection_weight", (width, hidden))
    yield from norm(f"{prefix}multi_modal_projector.mm_soft_emb_norm", width)


def qwen(config: Mapping[str, Any], _hidden: int, prefix: str) -> Part:
    """Qwen3.5's tower and merger."""
    c = Fields(config, "qwen3_5_vision")
    at, width, patch = f"{prefix}visual.", c.hidden, c.size("patch_size")
    patches = (width, c.size("in_channels", default=3), c.size("temporal_patch_size"), patch, patch)
    yield Tensor(f"{at}patch_embed.proj.weight", patches)
    yield Tensor(f"{at}patch_embed.proj.bias", (width,))
    yield Tensor(f"{at}pos_embed.weight", (c.size("num_position_embeddings"), width))
    for i in range(c.size("depth", most=MOST_LAYERS)):
        block = f"{at}blocks.{i}."
        yield from norm(f"{block}norm1", width, bias=True)
        yield from norm(f"{block}norm2", width, bias=True)
        yield from linear(f"{block}attn.qkv", 3 * width, width, bias=True)
        yield from linear(f"{block}attn.proj", width, width, bias=True)
        yield from linear(f"{block}mlp.linear_fc1", c.inner, width, bias=True)
        yield from linear(f"{block}mlp.linear_fc2", width, c.inner, bias=True)
    merged = width * c.size("spatial_merge_size") ** 2
    yield from norm(f"{at}merger.norm", width, bias=True)
    yield from linear(f"{at}merger.linear_fc1", merged, merged, bias=True)
    yield from linear(f"{at}merger.linear_fc2", c.size("out_hidden_size"), merged, bias=True)


def llama4(config: Mapping[str, Any], hidden: int, _prefix: str) -> Part:
    """Llama 4's tower, adapter and projector."""
    c = Fields(config, "llama4_vision_model")
    at, width, patch = "vision_model.", c.hidden, c.size("patch_size")
    yield Tensor(f"{at}class_embedding", (width,))
    yield Tensor(f"{at}positional_embedding_vlm", ((c.size("image_size") // patch) ** 2 + 1, width))
    yield from linear(f"{at}patch_embedding.linear", width, c.size("num_channels", default=3) * patch**2)
    for name in ("layernorm_pre", "layernorm_post"):
        yield from norm(f"{at}{name}", width, bias=True)
    for i in range(c.layers):
        block = f"{at}model.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield from linear(f"{block}self_attn.{name}", width, width, bias=True)
        yield from linear(f"{block}mlp.fc1", c.inner, width, bias=True)
        yield from linear(f"{block}mlp.fc2", width, c.inner, bias=True)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield from norm(f"{block}{name}", width, bias=True)
    projected = c.size("projector_input_dim")
    yield from linear(f"{at}vision_adapter.mlp.fc1", projected, c.inner)
    yield from linear(f"{at}vision_adapter.mlp.fc2", c.size("projector_output_dim"), projected)
    yield from linear("multi_modal_projector.linear_1", hidden, c.size("vision_output_dim"))
