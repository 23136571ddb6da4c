"""Blocks run one by one give what the model gives; in every family, from the first block's hidden states on."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
import transformers
from torch import nn
from transformers import BertConfig, BertModel, PreTrainedModel, T5Config, T5Model

from spicerack.errors import UsageError
from spicerack.models.blocks.find import find, repeated
from spicerack.models.blocks.look import output_of, shared_inputs
from spicerack.nn import kinds

DECODERS = [
    "bloom", "cohere", "deepseek_v3", "falcon", "gemma2", "gemma3-text", "gpt2", "gpt_bigcode", "gpt_neo",
    "gpt_neox", "gpt_oss", "gptj", "granitemoe", "jetmoe", "lfm2", "llama", "llama4", "mamba", "mistral", "mixtral",
    "opt", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next", "smollm3",
]  # fmt: skip
ENCODERS = ["bert", "bert-classifier", "deberta", "distilbert", "electra", "modernbert", "mpnet", "roberta"]


ALTERNATING: dict[str, Any] = {
    **families.LLAMA, "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 8, "num_kv_shared_layers": 2,
}  # fmt: skip
ODD: dict[str, tuple[str, dict[str, Any], str]] = {
    "lists": ("OpenAIGPTConfig", families.GPT, "OpenAIGPTLMHeadModel"),
    "two classes": (
        "JambaConfig",
        {**families.LLAMA, "num_hidden_layers": 4, "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
         "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_dt_rank": 8, "use_mamba_kernels": False},
        "JambaForCausalLM",
    ),
    "shared keys": (
        "Gemma4TextConfig",
        {**ALTERNATING, "global_head_dim": 16, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 99},
        "Gemma4ForCausalLM",
    ),
    "biases handed on": ("T5Config", families.T5, "T5EncoderModel"),
    "several streams": (
        "Gemma3nTextConfig",
        {**ALTERNATING, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 99, "laurel_rank": 8,
         "altup_num_inputs": 3, "activation_sparsity_pattern": [0.0] * 4, "intermediate_size": [48] * 4},
        "Gemma3nForCausalLM",
    ),
}  # fmt: skip


def odd(name: str) -> PreTrainedModel:
    """A model whose blocks are not as most are."""
    config, settings, model = ODD[name]
    torch.manual_seed(0)
    built = getattr(transformers, model)(getattr(transformers, config)(**settings)).eval()
    with torch.no_grad():
        for parameter in built.parameters():  # nothing is 0, or 1, or does not matter
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return built


@pytest.mark.parametrize("name", ODD)
@torch.no_grad()
def test_odd_blocks_one_by_one_are_what_the_model_does(name: str) -> None:
    """Here the oracle is the model's own output: what comes out of the last block, through its last norm."""
    model = odd(name)
    stack = find(model)
    given = inputs(padded=name == "biases handed on")
    expected = output_of(model, stack.name(len(stack.blocks) - 1), given)
    hidden, calls = stack.calls(given)
    for block, arguments in zip(stack.blocks, calls, strict=True):
        hidden = stack.run(block, hidden, arguments)
    width = expected.shape[-1]
    assert torch.equal(hidden[..., :width], expected)
    assert (hidden.shape[-1] > width) == (name in ("shared keys", "several streams")), (
        "keys and values of one layer of each type"
    )


def test_what_earlier_blocks_left_is_of_the_text_at_hand() -> None:
    """A block that reads keys of an earlier one sees those that come with its hidden states, and no others."""
    model = odd("shared keys")
    stack = find(model)
    hidden, calls = stack.calls(inputs(padded=False))
    for block, arguments in zip(stack.blocks[:2], calls[:2], strict=True):
        hidden = stack.run(block, hidden, arguments)
    changed = hidden.clone()
    changed[..., model.config.hidden_size :] *= 2
    after, other = (stack.run(stack.blocks[2], some, calls[2]) for some in (hidden, changed))
    width = model.config.hidden_size
    assert not torch.allclose(after[..., :width], other[..., :width])
    assert torch.equal(other[..., width:], changed[..., width:]), "and hands them on"


def test_the_language_model_is_found_beside_a_larger_tower() -> None:
    vision = {**families.VISION, "hidden_size": 64, "num_hidden_layers": 6, "model_type": "clip_vision_model"}
    config = transformers.LlavaConfig(
        text_config={**families.LLAMA, "model_type": "llama"}, vision_config=vision, image_token_index=98
    )
    stack = find(transformers.LlavaForConditionalGeneration(config).eval())
    assert stack.path == "model.language_model.layers" and len(stack.blocks) == 2


REFUSED: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "reformer": (
        "ReformerConfig",
        {"hidden_size": 32, "feed_forward_size": 48, "num_attention_heads": 2, "attention_head_size": 16,
         "attn_layers": ["local", "local"], "vocab_size": 99, "axial_pos_embds": False, "is_decoder": True},
        "ReformerModelWithLMHead", "ReformerModelWithLMHead's blocks cannot be run one by one: .",
    ),
    "funnel": (
        "FunnelConfig",
        {"d_model": 32, "d_inner": 48, "n_head": 2, "d_head": 16, "vocab_size": 99, "block_sizes": [2, 2]},
        "FunnelModel", "FunnelModel: .* alone computes something else than in the model",
    ),
    "albert": ("AlbertConfig", {**families.SMALL, "embedding_size": 16}, "AlbertModel", "its 1 blocks 2 times"),
    "xlnet": (
        "XLNetConfig", {"d_model": 32, "d_inner": 48, "n_layer": 2, "n_head": 2, "vocab_size": 99}, "XLNetLMHeadModel",
        r"transformer.layer.0 returns hidden states \[5, 2, 32\]",
    ),
    "clip": (
        "CLIPConfig", {"text_config": families.SMALL, "vision_config": families.VISION}, "CLIPModel",
        "CLIPModel cannot be run on text alone: .",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_blocks_alone_do_not_do_is_refused_by_name(name: str) -> None:
    config, settings, model, reason = REFUSED[name]
    with pytest.raises(UsageError, match=reason) as caught:
        find(getattr(transformers, model)(getattr(transformers, config)(**settings)).eval())
    assert "--calib" in caught.value.hint


def test_blocks_that_share_weights_are_refused() -> None:
    model = families.build("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    with pytest.raises(UsageError, match=r"model.layers.0 and model.layers.1 share weights"):
        repeated(model)


def inputs(padded: bool) -> dict[str, torch.Tensor]:
    ids = torch.arange(3, 27).reshape(2, 12)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return {"input_ids": ids, "attention_mask": mask} if padded else {"input_ids": ids}


@pytest.mark.parametrize("family", [*DECODERS, *ENCODERS])
@torch.no_grad()
def test_one_by_one_is_what_the_model_does(family: str) -> None:
    model = families.build(family).eval()
    stack = find(model)
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
    stack = find(families.build("qwen2_moe"))
    assert stack.path == "model.layers" and stack.name(1) == "model.layers.1"
    assert "self_attn.q_proj" in kinds.linear_layers(stack.blocks[0])


def test_layers_are_grouped_by_the_tensor_they_get() -> None:
    x, y = torch.randn(3), torch.randn(3)
    assert shared_inputs([("q", x), ("k", x), ("o", y), ("v", x)]) == (("q", "k", "v"), ("o",))


def test_what_has_no_blocks_is_refused() -> None:
    config = {"vocab_size": 9, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    with pytest.raises(UsageError, match="encoder-decoder"):
        find(T5Model(T5Config(**config)))

    class Alone(PreTrainedModel):
        config_class = BertConfig

        def __init__(self, config: BertConfig) -> None:
            super().__init__(config)
            self.layer = nn.Linear(4, 4)

    with pytest.raises(UsageError, match="no repeated blocks"):
        find(Alone(BertConfig()))


def test_an_architecture_that_skips_a_block_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = BertModel(BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=3, num_attention_heads=2)).eval()
    stack = find(model)
    whole = list(model.encoder.layer)
    model.encoder.layer = nn.ModuleList(whole[:2])
    with pytest.raises(UsageError, match="called its 3 blocks 2 times"):
        stack.calls(inputs(padded=False))
