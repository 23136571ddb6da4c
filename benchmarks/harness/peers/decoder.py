"""A language model of TinyLlama-1.1B's shape with random weights, as a Hugging Face folder and as a GGUF file."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks.harness.peers.layer import Prepared
from spicerack.models.families.names import KEY_VALUE_CACHES

_FILE = "model.safetensors"


@dataclass(frozen=True, slots=True)
class Shape:
    """Names as in config.json."""

    hidden_size: int = 2048
    intermediate_size: int = 5632
    num_hidden_layers: int = 22
    num_attention_heads: int = 32
    num_key_value_heads: int = 4
    vocab_size: int = 32000
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5

    @property
    def head(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes."""
        hidden, inner, kv = self.hidden_size, self.intermediate_size, self.num_key_value_heads * self.head
        for i in range(self.num_hidden_layers):
            at = f"model.layers.{i}."
            yield f"{at}input_layernorm.weight", (hidden,)
            yield f"{at}post_attention_layernorm.weight", (hidden,)
            for name, rows in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden)):
                yield f"{at}self_attn.{name}_proj.weight", (rows, hidden)
            yield f"{at}mlp.gate_proj.weight", (inner, hidden)
            yield f"{at}mlp.up_proj.weight", (inner, hidden)
            yield f"{at}mlp.down_proj.weight", (hidden, inner)
        yield "model.norm.weight", (hidden,)
        yield "model.embed_tokens.weight", (self.vocab_size, hidden)
        yield "lm_head.weight", (self.vocab_size, hidden)


SHAPE = Shape()
PROMPT, DECODE = 512, 64
"""Tokens of a turn."""


@dataclass(frozen=True, slots=True)
class Decoder:
    """folder: the bfloat16 model. scratch: for what is made from it."""

    folder: Path
    scratch: Path
    threads: int

    @property
    def figures(self) -> tuple[str, ...]:
        return "prompt", "decode"


def prompt() -> list[int]:
    """The same random tokens for everyone."""
    ids: list[int] = torch.randint(SHAPE.vocab_size, (PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()
    return ids


def speeds(begin: float, middle: float, decode: int) -> dict[str, float]:
    """Seconds per token, if the prompt took from `begin` to `middle` and decoding from there until now."""
    return {"prompt": (middle - begin) / PROMPT, "decode": (time.perf_counter() - middle) / decode}


def make(scratch: Path, shape: Shape = SHAPE) -> Path:
    """The folder with the model, written if it is not there yet."""
    folder = scratch / "bfloat16"
    if not (folder / "config.json").is_file():
        folder.mkdir(exist_ok=True)
        random = torch.Generator().manual_seed(0)
        tensors = {
            name: (torch.randn(size, generator=random) * 0.02 if len(size) == 2 else torch.ones(size)).bfloat16()
            for name, size in shape.tensors()
        }
        save_file(tensors, folder / _FILE, metadata={"format": "pt"})
        config = {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_act": "silu",
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "tie_word_embeddings": False,
            "bos_token_id": 1, "eos_token_id": 2,
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config | asdict(shape)))
    return folder


_GGUF = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "model.norm": "output_norm", "model.embed_tokens": "token_embd", "lm_head": "output",
}  # fmt: skip


def write_gguf(folder: Path, path: Path) -> None:
    """The same model for llama.cpp: matrices in bfloat16, norms in float32, no tokenizer.

    llama.cpp pairs a head's rotary columns otherwise and would want q and k permuted. With random weights only the
    speed counts, and that is the same.
    """
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(SHAPE.max_position_embeddings)
    writer.add_embedding_length(SHAPE.hidden_size)
    writer.add_block_count(SHAPE.num_hidden_layers)
    writer.add_feed_forward_length(SHAPE.intermediate_size)
    writer.add_head_count(SHAPE.num_attention_heads)
    writer.add_head_count_kv(SHAPE.num_key_value_heads)
    writer.add_rope_dimension_count(SHAPE.head)
    writer.add_layer_norm_rms_eps(SHAPE.rms_norm_eps)
    writer.add_vocab_size(SHAPE.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    with safe_open(folder / _FILE, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(name)
            parts = name.removesuffix(".weight").removeprefix("model.layers.").partition(".")
            known = name.removesuffix(".weight")
            target = f"{_GGUF[known]}.weight" if known in _GGUF else f"blk.{parts[0]}.{_GGUF[parts[2]]}.weight"
            if tensor.ndim == 1:
                writer.add_tensor(target, tensor.float().numpy())
            else:
                raw = tensor.view(torch.uint8).numpy()
                writer.add_tensor(target, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def in_torch(model: Any) -> Prepared:
    """Prompt and greedy tokens of a transformers model, with its key-value cache. bytes: read for each token."""
    ids = torch.tensor([prompt()])

    @torch.no_grad()
    def turn(decode: int = DECODE) -> dict[str, float]:
        begin = time.perf_counter()
        step = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        token, name = step.logits[:, -1:].argmax(-1), next(name for name in KEY_VALUE_CACHES if name in step)
        cache = {name: step[name]}
        middle = time.perf_counter()
        for _ in range(decode):
            token = model(input_ids=token, use_cache=True, **cache).logits[:, -1:].argmax(-1)
        return speeds(begin, middle, decode)

    turn(2)
    tensors = (*model.parameters(), *model.buffers())
    return Prepared(turn, {"bytes": sum(t.nbytes for t in tensors) - model.get_input_embeddings().weight.nbytes})
