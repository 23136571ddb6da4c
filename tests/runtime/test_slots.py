"""Slots look like the layers whose places they keep, to whatever transformers does between building and filling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

import spicerack
from spicerack.errors import LoadError
from spicerack.models.families import names
from spicerack.nn import kinds
from spicerack.numerics.scheme import parse
from spicerack.runtime.slots import Expert, make_slot, make_stack_slot
from spicerack.storage.format import StoredTensor

SIZES = {
    "vocab_size": 70, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
    "max_position_embeddings": 40,
}  # fmt: skip
MASKED = {
    "Bert": {}, "Roberta": {}, "XLMRoberta": {}, "Camembert": {}, "Albert": {"embedding_size": 32}, "MPNet": {},
    "Deberta": {}, "DebertaV2": {}, "DistilBert": {"dim": 64, "hidden_dim": 96, "n_layers": 1, "n_heads": 4},
    "Electra": {"embedding_size": 32}, "ModernBert": {"pad_token_id": 0},
}  # fmt: skip


@pytest.mark.parametrize("family", MASKED)
@torch.no_grad()
def test_a_head_that_shares_weight_and_bias_with_a_packed_table(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    given: dict[str, Any] = SIZES | MASKED[family]
    model = getattr(transformers, f"{family}ForMaskedLM")(getattr(transformers, f"{family}Config")(**given)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_()
    model.save_pretrained(tmp_path / "float")
    table = next(n for n, m in model.named_modules() if m is model.get_input_embeddings())
    spicerack.quantize(tmp_path / "float", "w8", output=tmp_path / "out", rules=[f"{table}=w8"])
    small = spicerack.load(tmp_path / "out", compute="float")
    head = next(m for m in small.modules() if isinstance(m, nn.Module) and m is small.get_output_embeddings())
    assert head.packed is small.get_input_embeddings().packed
    ids = torch.arange(3, 21).view(2, 9)
    expected, logits = model(input_ids=ids).logits, small(input_ids=ids).logits
    assert (logits - expected).norm() / expected.norm() < 0.03
    own = {name for name, tensor in small.state_dict().items() if name.endswith("bias") and not tensor.numel()}
    assert not own, "a bias was cut"


@pytest.mark.parametrize("layer", [nn.Linear(8, 4), nn.Embedding(4, 8, padding_idx=1), Conv1D(4, 8)])
def test_it_has_the_shape_the_type_and_the_sizes(layer: nn.Module) -> None:
    model = nn.ModuleDict({"part": layer.bfloat16()})
    kind = kinds.of(layer)
    make_slot(
        model, "part", StoredTensor("part", parse("w8"), (4, 8), kind.role, torch.bfloat16, kind.transposed, True)
    )
    slot = model["part"]
    assert slot.weight.shape == layer.weight.shape and slot.weight.dtype == torch.bfloat16 and slot.weight.is_meta
    assert "weight" not in dict(slot.named_parameters())
    for key, value in vars(layer).items():
        if not key.startswith("_"):
            assert vars(slot)[key] == value, key


@torch.no_grad()
def test_initializers_that_look_at_the_shape(tmp_path: Path) -> None:
    config = transformers.WhisperConfig(
        d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=96, decoder_ffn_dim=96, vocab_size=70, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, max_source_positions=20, max_target_positions=20, num_mel_bins=8,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "float")
    rules = ["model.encoder.embed_positions=w8"]
    spicerack.quantize(tmp_path / "float", "w8", output=tmp_path / "out", rules=rules)
    small = spicerack.load(tmp_path / "out", compute="float")
    sound = {"input_features": torch.randn(1, 8, 40), "decoder_input_ids": torch.arange(3, 9)[None]}
    expected, logits = model(**sound).logits, small(**sound).logits
    assert (logits - expected).norm() / expected.norm() < 0.03


@pytest.mark.parametrize("known", [True, False])
@torch.no_grad()
def test_experts_are_grouped_along_the_axis_that_their_module_says(
    known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the names of families that we know, and by what the module says where we do not."""
    sizes: dict[str, Any] = {**SIZES, "num_key_value_heads": 2, "moe_num_experts": 3, "moe_topk": 2}
    torch.manual_seed(0)
    model = transformers.AriaTextForCausalLM(transformers.AriaTextConfig(**sizes, pad_token_id=0)).eval()
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "float")
    if not known:
        monkeypatch.setattr(names, "WRITE_HIDDEN", frozenset())
    spicerack.quantize(tmp_path / "float", "w8", output=tmp_path / "out")
    small, ids = spicerack.load(tmp_path / "out", compute="float"), torch.arange(3, 21).view(2, 9)
    expected = model(input_ids=ids).logits
    assert (small(input_ids=ids).logits - expected).norm() / expected.norm() < 0.03


def test_experts_that_are_packed_the_other_way_round_are_refused() -> None:
    config = transformers.AriaTextConfig(**SIZES, num_key_value_heads=2, moe_num_experts=3, pad_token_id=0)
    model = transformers.AriaTextForCausalLM(config)
    parameter = next(name for name, _ in model.named_parameters() if name.endswith("experts.down_proj"))
    with pytest.raises(LoadError, match="AriaExperts has it the other way round"):
        make_stack_slot(model, parameter, [[Expert("e", number)] for number in range(3)], transposed=False)
