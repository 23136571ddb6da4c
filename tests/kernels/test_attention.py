"""Native attention: against softmax in float64, in transformers' models, and where it steps back for torch's."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import spicerack
from spicerack.errors import ShapeError
from spicerack.kernels import attention
from spicerack.nn import attention as by_transformers


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool, scale: float
) -> torch.Tensor:
    """[B, L, H, V] float64; zeros where a query sees nothing."""
    share = q.shape[1] // k.shape[1]
    k, v = k.double().repeat_interleave(share, 1), v.double().repeat_interleave(share, 1)
    scores = q.double() @ k.transpose(2, 3) * scale
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[2:], dtype=torch.bool).triu(1), -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1).nan_to_num(0.0) @ v).transpose(1, 2)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3), kv_heads=st.integers(1, 3), share=st.integers(1, 3), queries=st.integers(1, 40),
    keys=st.integers(1, 150), width=st.sampled_from([16, 32, 80]), value_width=st.sampled_from([16, 48, 64]),
    kind=st.sampled_from(["plain", "causal", "padding", "any mask"]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), transposed=st.booleans(),
)  # fmt: skip
def test_equals_softmax(
    batch: int, kv_heads: int, share: int, queries: int, keys: int, width: int, value_width: int, kind: str,
    dtype: torch.dtype, transposed: bool,
) -> None:  # fmt: skip
    def made(heads: int, rows: int, columns: int, seed: int) -> torch.Tensor:
        if transposed:
            return values(batch, rows, heads, columns, seed=seed, dtype=dtype).transpose(1, 2)
        return values(batch, heads, rows, columns, seed=seed, dtype=dtype)

    q, k = made(kv_heads * share, queries, width, 1), made(kv_heads, keys, width, 2)
    v = made(kv_heads, keys, value_width, 3)
    mask = None
    if kind == "padding":
        mask = values(batch, 1, 1, keys, seed=4) > -1
    elif kind == "any mask":
        mask = values(1, kv_heads * share, queries, keys, seed=5) > 0
    causal, scale = kind == "causal", width**-0.5
    got = attention.attention(q, k, v, mask, causal=causal, scale=scale)
    want = exact(q, k, v, mask, causal, scale)
    assert got.dtype == dtype and got.is_contiguous()
    # Rounding to the type, and of scores: an error e in each score is at most 2 e in the weighted mean of |v| <= 5.
    bound = torch.finfo(dtype).eps * want.abs() + 1e-5
    assert ((got.double() - want).abs() <= bound).all()


def test_threads_do_not_change_a_bit(threads: None) -> None:
    q, k = values(2, 6, 70, 32), values(2, 2, 300, 32, seed=1)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(attention.attention(q, k, k, scale=0.2))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_no_keys_and_no_queries() -> None:
    q, none = values(1, 2, 3, 16), values(1, 2, 0, 16)
    assert torch.equal(attention.attention(q, none, none, scale=1.0), torch.zeros(1, 3, 2, 16))
    assert attention.attention(none, q, q, scale=1.0).shape == (1, 0, 2, 16)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"q": values(1, 2, 3, 24)}, "shapes"),
        ({"q": values(1, 2, 3, 24), "k": values(1, 2, 5, 24)}, "multiples of 16"),
        ({"k": values(1, 3, 5, 32), "v": values(1, 3, 5, 32)}, "heads"),
        ({"v": values(1, 2, 4, 32)}, "shapes"),
        ({"v": values(1, 2, 5, 32).double()}, "one type"),
        ({"q": values(2, 3, 32)}, "four axes"),
        ({"mask": torch.zeros(1, 1, 3, 5)}, "boolean"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, torch.Tensor], says: str) -> None:
    given = {"q": values(1, 2, 3, 32), "k": values(1, 2, 5, 32), "v": values(1, 2, 5, 32), "mask": None} | change
    with pytest.raises(ShapeError, match=says):
        attention.attention(**given, scale=1.0)  # type: ignore[arg-type]


# ---- in models -------------------------------------------------------------------------------------------------------


def llama() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def bert() -> PreTrainedModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False).eval()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each call of the native kernel, whether it was causal."""
    causals: list[bool] = []
    native = attention.attention

    def counted(*inputs: Any, causal: bool, **more: Any) -> torch.Tensor:
        causals.append(causal)
        return native(*inputs, causal=causal, **more)

    monkeypatch.setattr(attention, "attention", counted)
    return causals


def quantized(model: PreTrainedModel) -> PreTrainedModel:
    small = spicerack.quantize(model, "w8", compute="float")
    assert isinstance(small, PreTrainedModel)
    return small


@torch.no_grad()
def test_a_decoder_gives_what_it_gives_with_torchs_attention(calls: list[bool]) -> None:
    small = quantized(llama())
    ids = torch.arange(24).reshape(2, 12)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    for masks in ({}, {"attention_mask": mask}):
        calls.clear()
        ours = small(input_ids=ids, **masks).logits
        assert calls == [not masks] * 2
        small.set_attn_implementation("sdpa")
        theirs = small(input_ids=ids, **masks).logits
        small.set_attn_implementation(by_transformers.NAME)
        real = mask.bool() if masks else torch.ones(2, 12, dtype=torch.bool)
        assert (ours - theirs)[real].abs().max() < 1e-5


def test_decoding_with_a_cache_is_native_and_right(calls: list[bool]) -> None:
    small = quantized(llama())
    ids = torch.arange(9).reshape(1, 9)
    ours = small.generate(ids, max_new_tokens=6, do_sample=False)  # type: ignore[operator]
    assert calls == [True] * 2 + [False] * 10
    small.set_attn_implementation("sdpa")
    assert torch.equal(ours, small.generate(ids, max_new_tokens=6, do_sample=False))  # type: ignore[operator]


@torch.no_grad()
def test_an_encoder_with_padding(calls: list[bool]) -> None:
    small = quantized(bert())
    ids, mask = torch.arange(20).reshape(2, 10), torch.ones(2, 10, dtype=torch.long)
    mask[1, 6:] = 0
    calls.clear()
    ours = BertModel.forward(small, input_ids=ids, attention_mask=mask).last_hidden_state  # its modules
    assert calls == [False, False]
    small.set_attn_implementation("sdpa")
    theirs = small(input_ids=ids, attention_mask=mask).last_hidden_state
    assert (ours - theirs)[mask.bool()].abs().max() < 1e-5


def test_gradients_and_tracing_go_to_torch(calls: list[bool]) -> None:
    small = quantized(llama())
    embedded = values(1, 5, 64).requires_grad_()
    small(inputs_embeds=embedded).logits.sum().backward()
    assert embedded.grad is not None and embedded.grad.abs().sum() > 0 and not calls
    with torch.no_grad():
        traced = torch.compile(small, backend="eager")
        traced(input_ids=torch.arange(5)[None])
    assert not calls
    torch.compiler.reset()


WIDER = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "n_head": 2, "n_heads": 2}
WIDER |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}


@pytest.mark.parametrize(
    ("family", "native"),
    [
        ("bart", True), ("bert", True), ("distilbert", True), ("gemma2", False), ("gemma3-text", True), ("gpt2", True),
        ("gpt_neox", True), ("llama", True), ("mistral", True), ("mixtral", True), ("modernbert", True), ("opt", True),
        ("phi3", True), ("qwen3", True), ("roberta", True), ("smollm3", True), ("vit", True), ("falcon", False),
    ],
)  # fmt: skip
@torch.no_grad()
def test_families(family: str, native: bool, calls: list[bool]) -> None:
    """Heads 16 wide; the same outputs, and native where the family's attention is torch's."""
    config, given_settings, model_class = families.FAMILIES[family]
    torch.manual_seed(0)
    changed = {key: WIDER.get(key, value) for key, value in given_settings.items()}
    model = families.vars_of(model_class)(families.vars_of(config)(**changed)).eval()
    inputs: dict[str, torch.Tensor] = {"input_ids": torch.arange(3, 63).reshape(2, 30)}
    if family == "vit":
        inputs = {"pixel_values": values(2, 3, 16, 16)}
    else:
        inputs["attention_mask"] = torch.ones(2, 30, dtype=torch.long)
        inputs["attention_mask"][0, 20:] = 0
    theirs = model(**inputs)[0]
    by_transformers.use_native_attention(model)
    ours = model(**inputs)[0]
    assert bool(calls) == native
    real = inputs.get("attention_mask", torch.ones(1)).bool()
    difference = (ours - theirs).abs()
    assert (difference[real] if "input_ids" in inputs else difference).max() < 1e-5


def test_only_where_the_model_would_ask_torch() -> None:
    model = llama()
    model.set_attn_implementation("eager")
    assert quantized(model).config._attn_implementation == "eager"
    assert quantized(llama()).config._attn_implementation == by_transformers.NAME
    assert llama().config._attn_implementation == "sdpa", "the original is not changed"


def test_nobody_reads_of_it_on_disk(tmp_path: Path) -> None:
    small = quantized(llama())
    spicerack.save(small, tmp_path / "out")
    config = (tmp_path / "out" / "config.json").read_text()
    assert by_transformers.NAME not in json.dumps(json.loads(config).get("attn_implementation", ""))
    assert "_attn_implementation" not in config
    again = spicerack.load(tmp_path / "out")
    assert again.config._attn_implementation == by_transformers.NAME
    assert copy.deepcopy(again).config._attn_implementation == by_transformers.NAME
