"""A row that is one group, and a group that is a whole row: two schemes of a folder that are the same numbers there."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open

import spicerack


def test_a_folder_may_have_both(llama_folder, tmp_path: Path) -> None:
    model = llama_folder(hidden_size=128, intermediate_size=256)
    out = tmp_path / "out"
    spicerack.quantize(model, "w4g128", output=out, rules=["**.q_proj=w4"])
    small = spicerack.load(out)
    folder = next(out.glob("*.safetensors"))
    with safe_open(folder, "pt") as file:  # as compressed-tensors has it: eight codes of 4 bits in a word, lowest first
        packed = file.get_tensor("model.layers.0.self_attn.q_proj.weight_packed")
        scale = file.get_tensor("model.layers.0.self_attn.q_proj.weight_scale").float()
    codes = torch.stack([packed >> 4 * i & 15 for i in range(8)], -1).reshape(packed.shape[0], -1)
    assert torch.equal(small.model.layers[0].self_attn.q_proj.weight.float(), (codes - 8) * scale)
