"""BitNet b1.58: twins, and ternary weights and int8 activations against transformers' own functions."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import BitNetForCausalLM, LlamaConfig, LlamaForCausalLM

import spicerack
from spicerack.errors import UsageError
from spicerack.numerics.fake import fake_tokens
from spicerack.training.qat import bitnet
from spicerack.training.qat.fake_layers import FakeLayer

SIZES = {
    "vocab_size": 257, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip


def test_a_twin_is_a_llama_with_norms_before_the_outputs() -> None:
    config = LlamaConfig(**SIZES, tie_word_embeddings=True, rope_theta=5e4)
    twin = BitNetForCausalLM(bitnet.twin_config(config))
    llama = LlamaForCausalLM(config)
    missing, unexpected = twin.load_state_dict(llama.state_dict(), strict=False)
    assert not unexpected
    assert {name.rsplit(".", 2)[-2] for name in missing} == {"attn_sub_norm", "ffn_sub_norm"}
    assert twin.config.rope_parameters == config.rope_parameters and twin.config.hidden_act == "relu2"
    assert bitnet.twin_config(config, squared_relu=False).hidden_act == "silu"
    assert twin.lm_head.weight is twin.model.embed_tokens.weight


def test_what_has_no_twin() -> None:
    with pytest.raises(UsageError, match="no biases"):
        bitnet.twin_config(LlamaConfig(**SIZES, attention_bias=True))
    with pytest.raises(UsageError, match="4 heads of 32"):
        bitnet.twin_config(LlamaConfig(**SIZES, head_dim=32))


@pytest.mark.interop
def test_weights_and_activations_are_rounded_as_transformers_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function: function)  # which it would do while it is imported
    from transformers.integrations.bitnet import ActQuant, WeightQuant

    layer = spicerack.prepare_qat(nn.Linear(96, 64, bias=False), "ternarya8")
    assert isinstance(layer, FakeLayer)
    for _ in range(8):  # a mean that float16 holds, so that storing it changes nothing
        mean = layer.weight.data.abs().mean()
        layer.weight.data.mul_(mean.half().float() / mean)
    x = torch.randn(3, 7, 96)
    x[0, 0] = 0
    assert torch.allclose(layer.rounded_weight(), WeightQuant.apply(layer.weight), atol=1e-6)
    assert torch.allclose(fake_tokens(x), ActQuant.apply(x), atol=1e-6)
    outer = torch.randn(3, 7, 64)
    [by_weight] = torch.autograd.grad(layer(x), layer.weight, outer)
    assert torch.allclose(by_weight, outer.flatten(0, 1).t() @ fake_tokens(x).flatten(0, 1), atol=1e-4)  # all of it


def test_a_third_of_gaussian_weights_become_zero() -> None:
    """2 Phi(sqrt(2 / pi) / 2) - 1."""
    layer = nn.Linear(512, 512, bias=False)
    nn.init.normal_(layer.weight, std=0.02)
    small = spicerack.freeze(spicerack.prepare_qat(layer, "ternary"))
    zeros = (small.packed.qtensor().codes == 0).float().mean()
    assert float(zeros) == pytest.approx(0.31006, abs=3e-3)


def test_a_twin_trains() -> None:
    model = BitNetForCausalLM(bitnet.twin_config(LlamaConfig(**SIZES)))
    model = spicerack.prepare_qat(model, "ternarya8")
    ids = torch.randint(1, 257, (4, 16))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, betas=(0.9, 0.95))
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
