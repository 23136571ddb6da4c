"""PEFT's adapters around packed layers: attached by its own means, trained, and refused where they would be merged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import spicerack
from spicerack.errors import UsageError
from spicerack.nn.weight import PackedLayer

peft = pytest.importorskip("peft", reason="PEFT is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:fan_in_fan_out")  # of PEFT itself

IDS = torch.arange(3, 17).view(2, 7)


def llama() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=4)).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=IDS).logits
    return result


CONFIGS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "lora": (llama, lambda: peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)),
    "everywhere": (llama, lambda: peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)),
    "table": (llama, lambda: peft.LoraConfig(r=4, target_modules=["embed_tokens"], init_lora_weights=False)),
    "conv1d": (gpt2, lambda: peft.LoraConfig(r=4, target_modules=["c_attn"], init_lora_weights=False)),
    "dora": (llama, lambda: peft.LoraConfig(r=4, target_modules=["up_proj"], use_dora=True, init_lora_weights=False)),
    "loha": (llama, lambda: peft.LoHaConfig(r=4, target_modules=["q_proj"], init_weights=False)),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_attached_trained_and_never_merged_silently(name: str) -> None:
    build, config = CONFIGS[name]
    rules = ["model.embed_tokens=w8"] if name == "table" else []
    small = spicerack.quantize(build(), "w8", rules=rules, compute="float")
    expected = logits(small)
    adapted = peft.get_peft_model(small, config()).eval()
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    assert trained and all(p.grad is not None for p in trained.values())
    with_adapters = logits(adapted)
    assert not torch.allclose(with_adapters, expected, atol=1e-5)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), expected)
    for safe in (False, True):
        with pytest.raises(UsageError, match="a write would be lost"):
            adapted.merge_and_unload(safe_merge=safe)
    assert torch.equal(logits(adapted), with_adapters)
    assert torch.equal(logits(adapted.unload()), expected)


def test_an_adapted_layer_computes_what_the_float_one_with_its_weight_does() -> None:
    config = CONFIGS["everywhere"][1]
    small = spicerack.quantize(llama(), "w8", compute="float")
    plain = llama()
    for path, layer in small.named_modules():
        if isinstance(layer, PackedLayer):
            plain.get_parameter(f"{path}.weight").data = layer.decode()
    one, other = (peft.get_peft_model(model, config()).eval() for model in (small, plain))
    other.load_state_dict({n: t for n, t in one.state_dict().items() if "lora" in n}, strict=False)
    torch.testing.assert_close(logits(one), logits(other), atol=1e-5, rtol=1e-5)


def test_quantizing_an_adapted_model_leaves_the_adapters() -> None:
    config = peft.LoraConfig(r=64, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    adapted = peft.get_peft_model(llama(), config).eval()
    with pytest.warns(
        UserWarning, match=r"lm_head.modules_to_save.default \(an adapter's own, which is trained in float"
    ):
        small = spicerack.quantize(adapted, "w8", compute="float")
    packed = {name[name.index("layers.") :] for name, m in small.named_modules() if isinstance(m, PackedLayer)}
    block = "layers.0."
    assert packed == {
        *(f"{block}self_attn.{name}" for name in ("q_proj.base_layer", "k_proj", "v_proj", "o_proj")),
        *(f"{block}mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
    }
    before = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert before == {n for n, p in small.named_parameters() if p.requires_grad and ("lora" in n or "to_save" in n)}
    assert (logits(small) - logits(adapted)).norm() < 0.03 * logits(adapted).norm()
