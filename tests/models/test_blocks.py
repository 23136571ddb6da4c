"""Blocks run one by one give what the model gives; in every family, from the first block's hidden states on."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, PreTrainedModel, T5Config, T5Model

from spicerack.errors import UsageError
from spicerack.models import blocks
from spicerack.nn import kinds

DECODERS = [
    "bloom", "cohere", "deepseek_v3", "falcon", "gemma2", "gemma3-text", "gpt2", "gpt_bigcode", "gpt_neo",
    "gpt_neox", "gpt_oss", "gptj", "granitemoe", "jetmoe", "lfm2", "llama", "llama4", "mamba", "mistral", "mixtral",
    "opt", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next", "smollm3",
]  # fmt: skip
ENCODERS = ["bert", "bert-classifier", "deberta", "distilbert", "electra", "modernbert", "mpnet", "roberta"]


def inputs(padded: bool) -> dict[str, torch.Tensor]:
    ids = torch.arange(3, 27).reshape(2, 12)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return {"input_ids": ids, "attention_mask": mask} if padded else {"input_ids": ids}


@pytest.mark.parametrize("family", [*DECODERS, *ENCODERS])
@torch.no_grad()
def test_one_by_one_is_what_the_model_does(family: str) -> None:
    model = families.build(family).eval()
    stack = blocks.find(model)
    given = inputs(padded=family in ENCODERS)
    results: list[torch.Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        results.append(output[0] if isinstance(output, tuple) else output)

    hooks = [block.register_forward_hook(keep) for block in stack.blocks]
    whole = model(**given, **({"use_cache": False} if model.can_generate() else {}))[0]
    for hook in hooks:
        hook.remove()
    hidden, calls = stack.calls(given)
    assert len(calls) == len(stack.blocks) == len(results)
    for block, arguments, expected in zip(stack.blocks, calls, results, strict=True):
        hidden = stack.run(block, hidden, arguments)
        assert torch.equal(hidden, expected)
    assert torch.equal(model(**given, **({"use_cache": False} if model.can_generate() else {}))[0], whole), "restored"


def test_the_blocks_are_the_largest_list_and_named() -> None:
    stack = blocks.find(families.build("qwen2_moe"))
    assert stack.path == "model.layers" and stack.name(1) == "model.layers.1"
    assert "self_attn.q_proj" in kinds.linear_layers(stack.blocks[0])


def test_layers_are_grouped_by_the_tensor_they_get() -> None:
    x, y = torch.randn(3), torch.randn(3)
    assert blocks.shared_inputs([("q", x), ("k", x), ("o", y), ("v", x)]) == (("q", "k", "v"), ("o",))


def test_what_has_no_blocks_is_refused() -> None:
    config = {"vocab_size": 9, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    with pytest.raises(UsageError, match="encoder-decoder"):
        blocks.find(T5Model(T5Config(**config)))

    class Alone(PreTrainedModel):
        config_class = BertConfig

        def __init__(self, config: BertConfig) -> None:
            super().__init__(config)
            self.layer = nn.Linear(4, 4)

    with pytest.raises(UsageError, match="no repeated blocks"):
        blocks.find(Alone(BertConfig()))


def test_an_architecture_that_skips_a_block_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = BertModel(BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=3, num_attention_heads=2)).eval()
    stack = blocks.find(model)
    whole = list(model.encoder.layer)
    model.encoder.layer = nn.ModuleList(whole[:2])
    with pytest.raises(UsageError, match="called its 3 blocks 2 times"):
        stack.calls(inputs(padded=False))
