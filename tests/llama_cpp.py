"""llama.cpp itself (wheel xllamacpp) tokenizes: a model of zeros around a vocabulary, for tests of what files say."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from spicerack.storage.gguf.ggml import TYPES, TensorSpec
from spicerack.storage.gguf.metadata import Array, Entry, Value
from spicerack.storage.gguf.writer import GgufWriter

WIDTH = 32


def zeros_model(path: Path, vocabulary: Mapping[str, Entry], name: str = "zeros") -> Path:
    """Writes a Llama of one layer of zeros with these keys of a tokenizer, and returns the file."""
    counts = {
        "block_count": 1, "context_length": 256, "embedding_length": WIDTH, "feed_forward_length": WIDTH,
        "attention.head_count": 1, "attention.head_count_kv": 1,
    }  # fmt: skip
    metadata: dict[str, Entry] = {
        "general.architecture": Value("string", "llama"),
        "general.name": Value("string", name),
        **{f"llama.{key}": Value("u32", count) for key, count in counts.items()},
        "llama.attention.layer_norm_rms_epsilon": Value("f32", 2.0**-17),
        **vocabulary,
    }
    tokens = metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, Array)
    square = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (len(tokens), WIDTH), "output_norm.weight": (WIDTH,)}
    shapes |= {f"blk.0.{part}.weight": (WIDTH, WIDTH) for part in square}
    shapes |= {f"blk.0.{part}.weight": (WIDTH,) for part in ("attn_norm", "ffn_norm")}
    with GgufWriter(path, metadata, [TensorSpec(key, TYPES["F32"], shape) for key, shape in shapes.items()]) as writer:
        for key, shape in shapes.items():
            writer.write(key, torch.zeros(shape).view(torch.uint8))
    return path


class LlamaCpp:
    """A server of llama.cpp in this process, which is asked how it tokenizes."""

    def __init__(self, path: Path) -> None:
        xllamacpp = pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.warmup, params.fit_params = False, False
        params.n_ctx, params.n_parallel, params.cpuparams.n_threads, params.n_threads_http = 256, 1, 1, 1
        params.cache_ram_mib, params.verbosity = 0, -1
        self.server = xllamacpp.Server(params)

    def ids(self, text: str, *, ends: bool = False) -> list[int]:
        """Ids of a text, special tokens in it found; `ends`: with bos and eos, as the file says."""
        return list(self._ask("/tokenize", {"content": text, "add_special": ends, "parse_special": True})["tokens"])

    def rendered(self, messages: list[dict[str, Any]], **more: Any) -> str:
        """The text that llama.cpp makes of a chat."""
        return str(self._ask("/apply-template", {"messages": messages, **more})["prompt"])

    def _ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            self.server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            reply: dict[str, Any] = json.load(answer)
        return reply
