"""Text that the model writes itself: from its own distribution, by seed, whatever the batches."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel

from spicerack.errors import ActivationError, TextError, UsageError
from spicerack.text import generated
from spicerack.text.generated import EVEN_TOKENS, from_model, pick


def load(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), AutoTokenizer.from_pretrained(folder)


class Constant(torch.nn.Module):
    """Predicts the same logits [V] everywhere, and counts what it reads."""

    device = torch.device("cpu")

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits
        self.generation_config = SimpleNamespace(eos_token_id=None)
        text = SimpleNamespace(max_position_embeddings=4096)
        self.config = SimpleNamespace(get_text_config=lambda **_: text, is_encoder_decoder=False)

    def can_generate(self) -> bool:
        return True

    def forward(self, input_ids: torch.Tensor, use_cache: bool, cache: Any = None) -> dict[str, Any]:
        assert input_ids.shape[1] == 1, "the cache holds the rest"
        return {"logits": self.logits.expand(len(input_ids), 1, -1), "cache": cache}


def test_tokens_are_drawn_with_their_probabilities() -> None:
    logits = torch.tensor([0.0, 1.0, -torch.inf, 2.0, -1.0, -torch.inf], dtype=torch.float64)
    chance = torch.linspace(0, 1, 100_001, dtype=torch.float64)[:-1]
    counts = torch.bincount(pick(logits.expand(100_000, 6), chance), minlength=6)
    assert torch.allclose(counts.double() / 100_000, logits.softmax(0), atol=2e-5, rtol=0)
    assert counts[2] == counts[5] == 0
    assert pick(logits[None].flip(1), torch.zeros(1, dtype=torch.float64)).tolist() == [1], "the first is impossible"
    assert pick(logits[None], torch.tensor([1 - 2.0**-53], dtype=torch.float64)).tolist() == [4]


def test_the_first_tokens_are_drawn_more_evenly() -> None:
    """Against softmax(logits / 2) without special tokens, and softmax(logits) after those."""
    tokenizer = byte_tokenizer()
    logits = 1.5 * torch.randn(257, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ids = from_model(Constant(logits), tokenizer, samples=400, length=30, seed=0).ids
    assert bool((ids[:, 0] == 256).all())
    words = slice(1, EVEN_TOKENS + 1), slice(EVEN_TOKENS + 1, None)
    even = torch.cat([(logits[:256] / 2).softmax(0), torch.zeros(1)])
    for part, right in zip(words, (even, logits.softmax(0)), strict=True):
        counts = torch.bincount(ids[:, part].flatten(), minlength=257)
        frequent = right * counts.sum() >= 8
        observed = [*counts[frequent].tolist(), int(counts[~frequent].sum())]
        expected = [*right[frequent].tolist(), float(right[~frequent].sum())]
        assert chisquare(observed, [p * int(counts.sum()) for p in expected]).pvalue > 1e-3
        assert not counts[right == 0].any()


def test_text_is_as_surprising_as_the_model_expects(stdlib_lm: Path) -> None:
    """Of text drawn from p, the mean of -log p(token) is that of the entropy; read by the model without a cache."""
    model, tokenizer = load(stdlib_lm)
    text = from_model(model, tokenizer, samples=16, length=64, seed=0)
    assert text.ids.shape == (16, 64) and text.mask is None and text.unknown == 0
    with torch.no_grad():
        log_p = model(input_ids=text.ids).logits[:, EVEN_TOKENS:-1].double().log_softmax(-1)
    surprise = -log_p.gather(-1, text.ids[:, EVEN_TOKENS + 1 :, None])[..., 0]
    difference = surprise + (log_p.exp() * log_p).sum(-1)
    assert abs(float(difference.mean())) < 4 * float(difference.std()) / difference.numel() ** 0.5
    assert len(text.ids[:, 1].unique()) > 12


def test_batches_do_not_matter_and_seeds_do(llama_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load(llama_folder(), torch.float64)
    settings = {"samples": 5, "length": 40, "seed": 3}
    text = from_model(model, tokenizer, **settings)
    for batch in (1, 2, 5):
        monkeypatch.setattr(generated, "BATCH", batch)
        again = from_model(model, tokenizer, **settings)
        assert torch.equal(again.ids, text.ids) and again.sha256 == text.sha256
    assert torch.equal(from_model(model, tokenizer, **settings | {"samples": 2}).ids, text.ids[:2])
    other = from_model(model, tokenizer, **settings | {"seed": 4})
    assert other.sha256 != text.sha256 and text.source == "text that the model wrote, seed 3"


def test_after_an_end_comes_a_start() -> None:
    """For a tokenizer that puts a start token before every text."""
    from conftest import starting_tokenizer

    tokenizer = starting_tokenizer()
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    logits = torch.zeros(300)  # more than the tokenizer knows, as in models with a padded vocabulary
    logits[end] = 4.0
    ids = from_model(Constant(logits), tokenizer, samples=20, length=50, seed=0).ids
    assert bool((ids[:, 0] == start).all()) and int(ids.max()) < len(tokenizer)
    followers = ids[:, 1:][ids[:, :-1] == end]
    assert len(followers) > 50 and bool((followers == start).all())
    assert not torch.isin(ids[:, 1 : EVEN_TOKENS + 1], torch.tensor(tokenizer.all_special_ids)).any()


def test_what_cannot_write_is_refused(llama_folder: Any) -> None:
    tokenizer = byte_tokenizer()
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(UsageError, match="BertModel does not write text") as caught:
        from_model(BertModel(BertConfig(**small, vocab_size=300)), tokenizer, samples=1, length=8, seed=0)
    assert caught.value.hint == "give a calibration text"
    model, tokenizer = load(llama_folder())
    with pytest.raises(UsageError, match="2 sequences of 129 tokens: the model has 128 positions"):
        from_model(model, tokenizer, samples=2, length=129, seed=0)
    for samples, length in ((0, 8), (1, 1)):
        with pytest.raises(UsageError, match=f"{samples} sequences of {length} tokens"):
            from_model(model, tokenizer, samples=samples, length=length, seed=0)
    model.generation_config.eos_token_id = tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(UsageError, match="no token to start"):
        from_model(model, tokenizer, samples=1, length=8, seed=0)


def test_broken_models_are_refused() -> None:
    logits = torch.zeros(257)
    logits[65] = 60.0
    with pytest.raises(TextError, match=r"only [1-7] different tokens"):
        from_model(Constant(logits), byte_tokenizer(), samples=2, length=30, seed=0)
    logits[70] = torch.nan
    with pytest.raises(ActivationError, match="logits are not finite"):
        from_model(Constant(logits), byte_tokenizer(), samples=2, length=30, seed=0)
