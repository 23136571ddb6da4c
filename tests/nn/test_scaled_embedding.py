"""Embeddings that multiply what they look up by a number: packed, saved, trained, and the same as the float layer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GemmaConfig, GemmaForCausalLM, XGLMConfig, XGLMForCausalLM

import spicerack
from spicerack.models.families import names
from spicerack.nn import kinds
from spicerack.nn.embedding import Lookup, QEmbedding, ScaledEmbedding

IDS = torch.arange(3, 21).view(2, 9)
TINY = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
MODELS: dict[str, Any] = {
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**TINY)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**TINY)),
    "xglm": lambda: XGLMForCausalLM(
        XGLMConfig(vocab_size=64, d_model=64, ffn_dim=96, num_layers=1, attention_heads=4, scale_embedding=True)
    ),
}
RULE = "model.embed_tokens=w8"


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


def difference(one: Any, other: Any) -> float:
    with torch.no_grad():
        a, b = one(input_ids=IDS).logits.float(), other(input_ids=IDS).logits.float()
    return float((a - b).norm() / b.norm())


def test_the_names_are_those_whose_code_does_only_that() -> None:
    """Of all installed families, by their text."""
    found = set()
    for path in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        for name, body in re.findall(r"^class (\w+)\(nn\.Embedding\):\n(.*?)(?=^\S)", path.read_text(), re.S | re.M):
            code = re.search(r"    def forward\(self, (\w+)[^)]*\)[^:]*:\n(.*)\Z", body, re.S)
            only = code and rf"return super\(\).forward\({code[1]}\) \* self.embed_scale(.to\(self.weight.dtype\))?"
            if code and only and re.fullmatch(only, code[2].strip()):
                found.add(name)
    assert found == names.SCALED_EMBEDDING


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_it_looks_up_what_the_float_layer_would(model: Any, dtype: torch.dtype) -> None:
    model.to(dtype)
    small = spicerack.quantize(model, "w8", rules=[RULE], compute="float")
    packed, layer = small.model.embed_tokens, model.model.embed_tokens
    assert type(packed) is QEmbedding and packed.lookup.scale == pytest.approx(8.0)
    with torch.no_grad():
        layer.weight.copy_(packed.decode())
        assert torch.equal(packed(IDS), layer(IDS)) and packed(IDS).dtype == dtype
    assert "scale=8" in repr(packed) and float(packed.embed_scale) == 8.0


def test_from_folders_and_back_again(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "float")
    spicerack.quantize(tmp_path / "float", "w8", output=tmp_path / "out", rules=[RULE])
    small = spicerack.load(tmp_path / "out", compute="float")
    assert type(small.model.embed_tokens) is QEmbedding and small.lm_head.packed is small.model.embed_tokens.packed
    assert difference(small, model) < 0.05
    spicerack.save(small, tmp_path / "again")
    assert difference(spicerack.load(tmp_path / "again", compute="float"), small) < 1e-6


def test_trained_in_few_bits_and_frozen(model: Any) -> None:
    trained = spicerack.prepare_qat(model, "w8", rules=[RULE])
    trained(input_ids=IDS, labels=IDS).loss.backward()
    small = spicerack.freeze(trained.eval(), compute="float")
    assert type(small.model.embed_tokens) is QEmbedding
    assert difference(small, trained) < 1e-5
    again = spicerack.prepare_qat(small)  # its scales train
    assert difference(again.eval(), small) < 1e-5


def test_opened_it_is_a_float_layer_that_scales() -> None:
    kind = kinds.named("embedding")
    for lookup, cls in (
        (Lookup(2), nn.Embedding),
        (Lookup(None, 3.0), ScaledEmbedding),
        (Lookup(0, 0.1, True), ScaledEmbedding),
    ):
        weight = torch.randn(6, 8)
        layer = kind.unpack(nn.Parameter(weight), lookup, None)
        assert type(layer) is cls and Lookup.of(layer) == lookup and kinds.of(layer) is kind
        assert torch.equal(layer(torch.tensor([1, 5])), weight[[1, 5]] * (lookup.scale or 1.0))
