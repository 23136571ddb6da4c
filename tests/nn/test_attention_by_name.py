"""Native attention stands in only where a family's code says no more of "sdpa" than its name: the code is asked."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

import spicerack
from spicerack.nn import attention

TINY = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4)


class Asking(LlamaModel):
    """A model whose class asks, as families with sparse attention do; a plain Llama has its config type, too."""

    def asks(self) -> bool:
        return self.config._attn_implementation in ("eager", "sdpa")


def test_the_code_of_every_installed_family_was_asked() -> None:
    root = Path(transformers.__file__).parent / "models"
    sources = {path.parent.name: path.read_text() for path in root.glob("*/modeling_*.py")}
    comparing = {
        family: any(re.search(r"attn_impl\w*\W* (==|!=|in|not in) .*[\"']sdpa", line) for line in source.splitlines())
        for family, source in sources.items()
    }
    assert {"falcon", "dots3_note", "minimax_m3_vl"} <= {family for family, yes in comparing.items() if yes}
    for family in [family for family, yes in comparing.items() if yes] + ["sam", "sam2", "qwen2_vl", "bert", "llama"]:
        assert attention.compares_with_sdpa(sources[family]) == comparing[family], family


@pytest.mark.parametrize(
    ("code", "compares"),
    [
        ("if name == 'sdpa': pass", True),
        ('if "sdpa" in name: pass', True),
        ("SOME = ('eager', 'sdpa')\nif name not in SOME: pass", True),
        ("match name:\n    case 'sdpa': pass", True),
        ("if name.startswith('sdpa'): pass", True),
        ("CLASSES = {'sdpa': int}\nCLASSES[name]", False),
        ("def f(name: str = 'sdpa'): ALL['sdpa']", False),
        ("if name == 'flash_attention_2': pass", False),
    ],
)
def test_what_a_comparison_is(code: str, compares: bool) -> None:
    assert attention.compares_with_sdpa(code) == compares


@torch.no_grad()
def test_models_that_ask_keep_the_name_and_others_of_their_type_do_not() -> None:
    plain = spicerack.quantize(LlamaForCausalLM(TINY).eval(), "w8")
    assert plain.config._attn_implementation == attention.NAME
    asking = spicerack.quantize(Asking(TINY).eval(), "w8")
    assert asking.config._attn_implementation == "sdpa" and asking.asks()
    outer = LlamaForCausalLM(TINY).eval()
    outer.model = Asking(TINY).eval()
    assert spicerack.quantize(outer, "w8").config._attn_implementation == "sdpa", "inside of it, under one config"
