"""Small networks that are trained in a moment."""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

TINY = {
    "vocab_size": 257, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
IDS = torch.randint(1, 257, (4, 12), generator=torch.Generator().manual_seed(0))
SCHEMES = ["w8", "w4g32", "w4g32z", "w3g32", "w2g32h", "w2g32z", "w3t", "ternary"]


def tiny(**changes: object) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**TINY | changes))


def small_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.LayerNorm(96), nn.Linear(96, 64, bias=False))


def train(model: nn.Module, inputs: torch.Tensor, wanted: torch.Tensor, steps: int = 5, rate: float = 1e-3) -> None:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], rate)
    for _ in range(steps):
        optimizer.zero_grad()
        out = model(inputs)
        out = out.logits if hasattr(out, "logits") else out
        (out.float() - wanted).square().mean().backward()
        optimizer.step()
