"""Model folders for tests: headers with true shapes over files of holes, so that a 70B model takes no disk."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from spicerack.storage.format import of_folder
from spicerack.storage.reader import Checkpoint

BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I32": 4}
Shapes = Mapping[str, tuple[int, ...]]

LLAMA_70B: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def header(shapes: Shapes, dtype: str = "BF16") -> bytes:
    """The head of a safetensors file, written from its specification, as bytes."""
    entries, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


def sparse(path: Path, shapes: Shapes, dtype: str = "BF16") -> None:
    """A safetensors file whose data are holes: zeros that take no disk."""
    head = header(shapes, dtype)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + sum(math.prod(shape) for shape in shapes.values()) * BYTES[dtype])


def folder(path: Path, shapes: Shapes, config: Mapping[str, Any], shards: int = 1, dtype: str = "BF16") -> Path:
    """A model folder of holes; tensors are dealt to the shards in order."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    if shards == 1:
        sparse(path / "model.safetensors", shapes, dtype)
        return path
    names = list(shapes)
    weight_map: dict[str, str] = {}
    for i in range(shards):
        shard = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: shapes[name] for name in names[len(names) * i // shards : len(names) * (i + 1) // shards]}
        sparse(path / shard, part, dtype)
        weight_map |= dict.fromkeys(part, shard)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


def llama_shapes(config: Mapping[str, Any], layers: Iterable[int] | None = None) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of a Llama checkpoint."""
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(config["num_hidden_layers"]) if layers is None else layers:
        shapes |= {
            f"model.layers.{i}.self_attn.q_proj.weight": (hidden, hidden),
            f"model.layers.{i}.self_attn.k_proj.weight": (keys, hidden),
            f"model.layers.{i}.self_attn.v_proj.weight": (keys, hidden),
            f"model.layers.{i}.self_attn.o_proj.weight": (hidden, hidden),
            f"model.layers.{i}.mlp.gate_proj.weight": (inner, hidden),
            f"model.layers.{i}.mlp.up_proj.weight": (inner, hidden),
            f"model.layers.{i}.mlp.down_proj.weight": (hidden, inner),
            f"model.layers.{i}.input_layernorm.weight": (hidden,),
            f"model.layers.{i}.post_attention_layernorm.weight": (hidden,),
        }
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def mixtral_shapes(layers: int, experts: int) -> dict[str, tuple[int, ...]]:
    """The expert tensors of an unfused mixture of experts: three matrices per expert and a router per layer."""
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(layers):
        block = f"model.layers.{i}.block_sparse_moe"
        shapes[f"{block}.gate.weight"] = (experts, 1024)
        for e in range(experts):
            shapes |= {f"{block}.experts.{e}.{w}.weight": (512, 1024) for w in ("w1", "w3")}
            shapes[f"{block}.experts.{e}.w2.weight"] = (1024, 512)
    return shapes


def codes(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(folder)
    fmt = of_folder(checkpoint)
    assert fmt is not None
    codes_of = {}
    for name, stored in fmt.contents(checkpoint).items():
        tensors = {key: checkpoint.read(key) for key in fmt.layout(stored)}
        codes_of[name] = fmt.decode(stored, tensors).codes
    return codes_of
