"""The quantized cache in models: beside transformers' float one, by itself, from folders and on the command line."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from click.testing import CliRunner
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    StaticCache,
)

import spicerack
from spicerack.cli import _output, cli
from spicerack.errors import UsageError
from spicerack.evaluation import bench
from spicerack.evaluation.evaluate import evaluate
from spicerack.nn.cache import QuantizedCache, QuantizedLayer
from spicerack.nn.cache_segments import CacheScheme
from spicerack.runtime.cache import use_quantized_cache

SMALL = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 256,
}  # fmt: skip


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2, initializer_range=0.2)).eval()


def mistral() -> MistralForCausalLM:
    torch.manual_seed(0)
    config = MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=100, initializer_range=0.2)
    return MistralForCausalLM(config).eval()


def ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(64, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def stepwise(
    model: PreTrainedModel, tokens: torch.Tensor, cache: Any, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Logits of a prompt of 80 tokens, then one at a time."""
    parts = []
    for begin, end in ((0, 80), *((i, i + 1) for i in range(80, tokens.shape[1]))):
        masks = {} if mask is None else {"attention_mask": mask[:, :end]}
        output = model(input_ids=tokens[:, begin:end], cache=cache, use_cache=True, **masks)
        cache = output.cache
        parts.append(output.logits)
    return torch.cat(parts, dim=1)


def kl(want: torch.Tensor, got: torch.Tensor) -> float:
    p, q = want.double().log_softmax(-1), got.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("make", [llama, mistral])
@pytest.mark.parametrize(("bits", "least", "most"), [(8, 1e-9, 4e-4), (4, 1e-6, 0.06)])
def test_predictions_stay_near(make: Callable[[], PreTrainedModel], bits: int, least: float, most: float) -> None:
    """A left-padded batch; and nothing changes before a token is packed.

    Over 20 texts of 10 models the divergence was .5e-4 to 1.9e-4 and .010 to .037; bounds are five standard deviations
    and more above the mean.
    """
    model, tokens = make(), ids(2, 130)
    mask = torch.ones_like(tokens)
    mask[1, :30] = 0
    want = stepwise(model, tokens, DynamicCache(config=model.config), mask)
    got = stepwise(model, tokens, QuantizedCache(model.config, bits), mask)
    assert torch.equal(want[0, :80], got[0, :80]), "the prompt itself is computed in float"
    assert least < kl(want[0, 80:], got[0, 80:]) < most
    assert least < kl(want[1, 80:], got[1, 80:]) < most


def test_greedy_text_is_the_float_caches_while_its_margins_are_clear() -> None:
    model: Any = llama()
    ours: Any = copy.deepcopy(model)
    use_quantized_cache(ours, 8)
    prompt = ids(16, 90, seed=1)  # a single one may have no clear token at all
    how = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    want = model.generate(prompt, **how, output_logits=True, return_dict_in_generate=True)
    got = ours.generate(prompt, **how)
    assert torch.equal(got, model.generate(prompt, cache=QuantizedCache(model.config, 8), **how))
    best = torch.stack(want.logits, dim=1).topk(2).values
    # Where two texts parted, for 18 models and 16 prompts each, the margin was .065 at most.
    clear = (best[..., 0] - best[..., 1] > 0.15).long().cumprod(1)
    assert clear.sum() > 15  # 36 to 106 over 12 seeds
    assert torch.equal(got[:, 90:] * clear, want.sequences[:, 90:] * clear)


@pytest.mark.parametrize("residual", [1000, 0])
def test_beam_search_takes_the_caches_along(residual: int) -> None:
    """Score of the best beams: that of the float cache to the bit as long as nothing is packed, and near it after.

    Where two beams are nearly equal another wins, and scores part by up to .19; for half of 16 prompts they were within
    .002 to .006 for each of ten models; caches that do not follow their beams were .031 off.
    """
    model: Any = llama()
    cache = QuantizedCache(model.config, scheme=CacheScheme(8, residual=residual))
    how: dict[str, Any] = {"max_new_tokens": 40, "num_beams": 4, "do_sample": False, "pad_token_id": 0}
    how |= {"return_dict_in_generate": True, "output_scores": True}
    prompt = ids(16, 40, seed=1)
    want = model.generate(prompt, **how).sequences_scores
    got = model.generate(prompt, cache=cache, **how).sequences_scores
    assert torch.equal(want, got) if residual else (want - got).abs().median() < 0.012
    assert (cache.layers[0].packed is None) == (residual == 1000)


@pytest.mark.parametrize("how", ["generate", "forward", "decoder", "positional", "empty cache"])
def test_the_model_uses_it_by_itself(how: str) -> None:
    model: Any = llama()
    use_quantized_cache(model, 4)
    prompt = ids(1, 100)
    if how == "generate":
        cache = model.generate(
            prompt, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, pad_token_id=0
        ).cache
    elif how == "forward":
        cache = model(prompt).cache
    elif how == "decoder":
        cache = model.model(input_ids=prompt).cache
    elif how == "positional":
        cache = model.model(prompt, torch.ones_like(prompt), None, DynamicCache(config=model.config)).cache
    else:
        given = DynamicCache()
        cache = model(input_ids=prompt, cache=given).cache
        assert cache is given
    assert all(isinstance(part, QuantizedLayer) and part.scheme.bits == 4 for part in cache.layers)
    assert cache.layers[0].packed is not None
    assert cache.get_seq_length() == (104 if how == "generate" else 100)
    assert model(input_ids=prompt, use_cache=False).cache is None
    again = copy.deepcopy(model)(input_ids=prompt)
    assert isinstance(again.cache, QuantizedCache) and again.cache is not cache


def test_a_cache_of_another_kind_is_refused() -> None:
    model: Any = llama()
    prompt = ids(1, 10)
    filled = model(input_ids=prompt).cache
    use_quantized_cache(model, 8)
    with pytest.raises(UsageError, match="DynamicCache with tokens in float"):
        model(input_ids=prompt, cache=filled)
    with pytest.raises(UsageError, match="StaticCache"):
        model(input_ids=prompt, cache=StaticCache(config=model.config, max_cache_len=32))
    mine = QuantizedCache(model.config, 4)
    assert model(input_ids=prompt, cache=mine).cache is mine


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (lambda: BertModel(BertConfig(**SMALL)), "BertModel does not generate text"),
        (lambda: MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1)), "LinearAttention"),
        (
            lambda: BartForConditionalGeneration(BartConfig(**families.SEQ2SEQ, max_position_embeddings=64)),
            "encoder-decoder",
        ),
    ],
)
def test_models_without_such_a_cache_are_refused(model: Callable[[], PreTrainedModel], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        use_quantized_cache(model(), 8)


@pytest.mark.parametrize("family", ["bloom", "falcon", "gemma2", "gpt2", "gpt_neox", "opt", "deepseek_v3", "rwkv"])
@torch.no_grad()
def test_families(family: str) -> None:
    """Any head width, with sliding windows or without: near the float cache's, or refused by name."""
    config, given_settings, model_class = families.FAMILIES[family]
    torch.manual_seed(0)
    model = families.vars_of(model_class)(families.vars_of(config)(**given_settings)).eval()
    if family == "rwkv":
        with pytest.raises(UsageError, match="takes no cache"):
            use_quantized_cache(model, 8)
        return
    tokens = torch.arange(3, 61)[None]
    cache = model(input_ids=tokens[:, :50], use_cache=True).cache
    want = model(input_ids=tokens[:, 50:], cache=cache).logits
    use_quantized_cache(model, 8)
    cache = model(input_ids=tokens[:, :50], use_cache=True).cache
    cache = copy.deepcopy(cache)
    for part in cache.layers:  # the test is short: pack more than the default would
        part.scheme = CacheScheme(8, residual=0)
        part._pack()
    got = model(input_ids=tokens[:, 50:], cache=cache).logits
    assert 0 < kl(want, got) < 1e-5


# ---- from folders, and on the command line ---------------------------------------------------------------------------


def test_load_generate_eval_and_bench(llama_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = llama_folder()
    spicerack.quantize(folder, "w8", output=tmp_path / "out")
    model: Any = spicerack.load(tmp_path / "out", cache=4)
    assert model(input_ids=torch.arange(100)[None]).cache.layers[1].packed is not None
    run = CliRunner().invoke(
        cli, ["generate", str(folder), "x" * 90, "--cache", "8", "--max-new-tokens", "5", "--json"]
    )
    assert run.exit_code == 0 and json.loads(run.stdout)["tokens"] >= 1
    text = tmp_path / "text.txt"
    text.write_text("def f(x): return x + 1\n" * 20)
    losses = {
        bits: evaluate(tmp_path / "out", against=folder, text=text, window=128, cache=bits, dtype=torch.float32)
        for bits in (None, 8, 4)
    }
    assert losses[4]["cache"] == 4 and "cache" not in losses[None]
    assert losses[4]["kl_mean"] > losses[None]["kl_mean"] and losses[8]["kl_mean"] < losses[4]["kl_mean"]
    options = bench.BenchOptions(prefill=96, decode=4, repeats=1, cache=4)
    figures = bench.bench(tmp_path / "out", against=folder, options=options).as_dict()
    original, small = figures["rows"]
    assert original["cache_bytes"] == 2 * 2 * 2 * 100 * 16 * 4 and figures["cache"] == 4
    assert small["cache_bytes"] < original["cache_bytes"]


def test_folders_and_options_that_do_not_fit(tmp_path: Path, capsys: Any, llama_folder: Callable[..., Path]) -> None:
    BertModel(BertConfig(**SMALL)).save_pretrained(tmp_path / "bert")
    with pytest.raises(UsageError, match="no cache to quantize"):
        spicerack.load(tmp_path / "bert", cache=8)
    with pytest.raises(UsageError, match="an encoder: it has no cache"):
        evaluate(tmp_path / "bert", against=tmp_path / "bert", cache=8)
    with pytest.raises(UsageError, match="module of your own"):
        spicerack.load(tmp_path / "bert", into=torch.nn.Linear(1, 1), cache=8)  # type: ignore[call-overload]
    assert _output.run(cli, ["generate", str(llama_folder()), "x", "--cache", "3"]) == 2
    assert "use 8 or 4" in capsys.readouterr().err
