"""Predictions compared: closed forms, other libraries' answers, and models of several families."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from conftest import byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from spicerack.errors import SpicerackError, TextError, UsageError
from spicerack.evaluation.intervals import mean_interval, spearman, t_quantile
from spicerack.evaluation.language import compare, paired_difference
from spicerack.evaluation.logits import chunk_positions, logits
from spicerack.text.pieces import pieces, sentences, start_token
from spicerack.text.windows import Window, windows

FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Gemma2": {"final_logit_softcapping": 0.5, "head_dim": 8},
    "Granite": {"logits_scaling": 7.0},
    "Cohere": {"logit_scale": 0.3},
    "GPTNeoX": {},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "OPT": {"ffn_dim": 64, "word_embed_proj_dim": 32, "pad_token_id": 0},
}
RUNS_BODY_TWICE = {"OPT"}  # its head asks for a part of the body


class Table(torch.nn.Module):
    """A model whose logits [L, V] are given, whatever it reads."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.table = logits
        self.device = logits.device
        self.config = SimpleNamespace(get_text_config=lambda **_: SimpleNamespace(vocab_size=logits.shape[-1]))
        self.base_model = self

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[None, : input_ids.shape[1]])


def random_model(family: str) -> Any:
    torch.manual_seed(0)
    settings = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    config = getattr(transformers, f"{family}Config")(
        **settings | {"bos_token_id": 1, "eos_token_id": 2} | FAMILIES[family]
    )
    model = getattr(
        transformers, f"{family}{'LMHead' if family == 'GPT2' else 'ForCausalLM'}{'Model' if family == 'GPT2' else ''}"
    )
    return model(config).eval()


def one_window(*ids: int) -> list[Window]:
    return [Window(torch.tensor(ids), 0, 1.0)]


def random_windows(count: int, length: int, vocabulary: int) -> list[Window]:
    random = torch.Generator().manual_seed(1)
    return [Window(torch.randint(vocabulary, (length,), generator=random), 0, (i + 1) / count) for i in range(count)]


# ------------------------------------------------------------------------------------------------------- closed forms


def test_kl_of_two_known_distributions() -> None:
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])
    result = compare(Table(p.log().expand(3, 3)), Table(q.log().expand(3, 3)), one_window(0, 1, 2))
    expected = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert result.kl.tolist() == pytest.approx([expected], abs=1e-7)
    assert result.tokens == 2
    assert result.as_dict()["top1_agreement"] == 0.0
    assert result.as_dict()["perplexity_reference"] == pytest.approx(4.0, rel=1e-6)  # tokens 1 and 2, 1/4 each
    assert result.as_dict()["perplexity"] == pytest.approx(math.sqrt(4 * 2), rel=1e-6)


@settings(deadline=None)
@given(st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=9), st.floats(-5, 5))
def test_kl_matches_scipy_and_is_blind_to_a_constant(values: list[float], shift: float) -> None:
    from scipy.special import rel_entr, softmax

    ours = torch.tensor([values, values])
    theirs = torch.tensor([values[::-1], values[::-1]])
    kl = float(compare(Table(ours + shift), Table(theirs), one_window(0, 0)).kl)
    expected = rel_entr(softmax((ours + shift)[0].double().numpy()), softmax(theirs[0].double().numpy())).sum()
    assert kl == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_kl_of_a_distribution_with_itself_is_zero_and_so_is_that_of_what_never_happens() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 3.0]] * 4)
    result = compare(Table(logits), Table(logits), one_window(0, 2, 0, 2))
    assert result.kl.tolist() == [0.0]
    assert result.as_dict()["top1_agreement"] == 1.0


def test_perplexity_of_a_uniform_model_is_its_vocabulary() -> None:
    uniform = Table(torch.zeros(8, 40))
    figures = compare(uniform, uniform, random_windows(3, 8, 40)).as_dict()
    assert figures["perplexity"] == pytest.approx(40.0)
    assert figures["tokens"] == 21


def test_p999_is_exact() -> None:
    import numpy as np

    random = torch.Generator().manual_seed(2)
    ours, theirs = (torch.randn(400, 5, generator=random) for _ in range(2))
    result = compare(Table(ours), Table(theirs), random_windows(3, 400, 5))
    assert result.as_dict()["kl_p999"] == pytest.approx(np.quantile(result.kl_tokens.numpy(), 0.999))
    assert float(result.kl_tokens.sum()) == pytest.approx(float(result.kl.mean()) * result.tokens, rel=1e-5)


def test_logits_that_are_not_finite_are_named() -> None:
    good, bad = torch.zeros(4, 5), torch.zeros(4, 5)
    bad[2, 3] = torch.nan
    with pytest.raises(SpicerackError, match=r"window 0: the quantized model's logits are not finite"):
        compare(Table(good), Table(bad), one_window(0, 1, 2, 3))
    with pytest.raises(SpicerackError, match=r"the reference model's"):
        compare(Table(bad), Table(good), one_window(0, 1, 2, 3))


def test_models_that_do_not_belong_together() -> None:
    with pytest.raises(UsageError, match="vocabularies differ: 5 and 6"):
        compare(Table(torch.zeros(3, 5)), Table(torch.zeros(3, 6)), one_window(0, 1, 2))
    with pytest.raises(UsageError, match="token 7, but the model's vocabulary has 5"):
        compare(Table(torch.zeros(3, 5)), Table(torch.zeros(3, 5)), one_window(0, 7, 2))
    with pytest.raises(TextError):
        compare(Table(torch.zeros(3, 5)), Table(torch.zeros(3, 5)), [])


# --------------------------------------------------------------------------------------------------- chunks of logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("positions", [1, 5, 16, 100])
def test_chunked_logits_are_the_whole_logits(family: str, positions: int) -> None:
    model = random_model(family)
    ids = torch.randint(97, (1, 16), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        whole = model(input_ids=ids).logits
        chunks = list(logits(model, ids, positions))
        again = model(input_ids=ids).logits
    assert [chunk.shape[1] for chunk in chunks[:-1]] == [positions] * (len(chunks) - 1)
    torch.testing.assert_close(torch.cat(chunks, dim=1), whole, rtol=1e-5, atol=1e-6)
    assert torch.equal(again, whole), "the model is as it was"


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - RUNS_BODY_TWICE))
def test_the_body_runs_once_and_the_head_sees_few_positions(family: str) -> None:
    model = random_model(family)
    bodies: list[int] = []
    rows: list[int] = []
    decoder = model.base_model.layers if hasattr(model.base_model, "layers") else model.base_model.h
    decoder[0].register_forward_hook(lambda *_: bodies.append(1))
    model.get_output_embeddings().register_forward_hook(lambda _m, args, _o: rows.append(args[0].shape[1]))
    compare(model, copy.deepcopy(model), random_windows(1, 16, 97), positions=3)
    assert len(bodies) == 2  # the copy's hook writes into the same list
    assert max(rows) == 3


def test_the_comparison_does_not_depend_on_the_chunk() -> None:
    a, b = random_model("Gemma2"), random_model("Gemma2")
    with torch.no_grad():
        b.base_model.layers[0].mlp.down_proj.weight.mul_(1.5)
    results = [compare(a, b, random_windows(3, 16, 97), positions=n) for n in (1, 4, 15, 16, None)]
    for other in results[1:]:
        torch.testing.assert_close(other.kl, results[0].kl, rtol=1e-4, atol=1e-9)
        assert torch.equal(other.agreed, results[0].agreed)


def test_a_larger_vocabulary_means_fewer_positions() -> None:
    assert chunk_positions(32) > 100_000
    assert chunk_positions(262_144) == 32
    assert chunk_positions(1 << 40) == 1


# ---------------------------------------------------------------------------------------------------- a trained model


def test_kl_grows_with_the_square_of_a_perturbation(stories: Path, tmp_path: Path) -> None:
    """D(p || p + e) is quadratic in small e: twice the noise, four times the KL. The text is the model's own."""
    model = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(stories)
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little girl named Lily. She loved to play outside in the park. " * 12)
    cut = list(windows(text, tokenizer, 128))
    assert len(cut) >= 2
    assert all(int(window.ids[0]) == tokenizer.bos_token_id for window in cut)
    results = [compare(model, perturbed(model, size), cut) for size in (0.0, 0.01, 0.02, 0.02)]
    assert results[0].mean == 0.0
    assert results[2].mean / results[1].mean == pytest.approx(4.0, rel=0.3)
    assert results[1].as_dict()["perplexity_reference"] < 6, "a trained model knows this text"
    mean, lo, hi = paired_difference(results[2], results[1])
    assert mean == pytest.approx(results[2].mean - results[1].mean)
    assert lo is not None and hi is not None and 0 < lo < mean < hi
    assert paired_difference(results[2], results[3]) == (0.0, 0.0, 0.0)


def perturbed(model: Any, size: float) -> Any:
    """A copy whose linear weights each moved by `size` of their own size, up or down; the same way for every size."""
    other = copy.deepcopy(model)
    random = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "_proj" in name:
                parameter.mul_(1 + size * torch.randn(parameter.shape, generator=random))
    return other


def test_results_on_different_text_are_not_paired() -> None:
    table = Table(torch.zeros(4, 9))
    a, b = (compare(table, table, one_window(0, 1, 2, last)) for last in (3, 4))
    with pytest.raises(UsageError, match="different text"):
        paired_difference(a, b)


# --------------------------------------------------------------------------------------------------------- statistics


def test_t_quantiles_match_scipy() -> None:
    from scipy import stats

    for degrees in (*range(1, 200), 1000, 10**6):
        assert t_quantile(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-5), degrees


def test_mean_interval_matches_scipy() -> None:
    from scipy import stats

    values = torch.randn(12, generator=torch.Generator().manual_seed(5))
    _, lo, hi = mean_interval(values)
    expected = stats.ttest_1samp(values.double().numpy(), 0.0).confidence_interval(0.95)
    assert (lo, hi) == pytest.approx(tuple(expected), rel=1e-5)
    assert mean_interval(torch.tensor([3.0])) == (3.0, None, None)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Over windows whose tokens depend on each other: one effect per window, 50 tokens each. An interval over tokens
    would cover far less often."""
    random = torch.Generator().manual_seed(6)
    runs, count = 1000, 8
    effects = torch.randn(runs, count, 1, generator=random, dtype=torch.float64)
    tokens = 1.0 + effects + torch.randn(runs, count, 50, generator=random, dtype=torch.float64)
    covered = naive = 0
    for run in tokens:
        _, lo, hi = mean_interval(run.mean(dim=1))
        covered += lo < 1.0 < hi
        _, lo, hi = mean_interval(run.flatten())
        naive += lo < 1.0 < hi
    assert 0.92 < covered / runs < 0.98  # four standard deviations of a share of .95 of 1000
    assert naive / runs < 0.5


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=3, max_size=40))
def test_spearman_with_ties_matches_scipy(pairs: list[tuple[int, int]]) -> None:
    from scipy import stats

    a, b = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    if len(a.unique()) == 1 or len(b.unique()) == 1:
        assert spearman(a, b) is None
    else:
        assert spearman(a, b) == pytest.approx(stats.spearmanr(a.numpy(), b.numpy()).statistic, abs=1e-12)


# --------------------------------------------------------------------------------------------------------------- text


@pytest.fixture
def text(tmp_path: Path) -> Iterator[Path]:
    return tmp_path / "text.txt"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        ("caf\xe9 ".encode("latin-1") * 9, "not UTF-8.*near byte 3"),
        (b"PK\x03\x04\x00\x00", "not text: it has a zero byte"),
        (b"good\xe2\x82", "not UTF-8"),
    ],
)
def test_what_is_not_text_is_refused(text: Path, content: bytes, message: str) -> None:
    text.write_bytes(content)
    with pytest.raises(TextError, match=message) as caught:
        list(windows(text, byte_tokenizer(), 2))
    assert caught.value.hint and str(text) in caught.value.message


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="does not exist"):
        list(pieces(tmp_path / "none.txt"))
    with pytest.raises(TextError, match="is a folder"):
        list(pieces(tmp_path))


def test_a_text_shorter_than_a_window_is_refused(text: Path) -> None:
    text.write_text("nine char")
    with pytest.raises(TextError, match="has 9 tokens, less than one window of 10"):
        list(windows(text, byte_tokenizer(), 10))
    assert len(list(windows(text, byte_tokenizer(), 9))) == 1
    with pytest.raises(TextError, match="--max-tokens 8 is less than one window"):
        list(windows(text, byte_tokenizer(), 9, max_tokens=8))


@settings(deadline=None)
@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1), st.integers(1, 9))
def test_pieces_lose_nothing(tmp_path_factory: pytest.TempPathFactory, content: str, size: int) -> None:
    path = tmp_path_factory.getbasetemp() / "pieces.txt"
    path.write_bytes(b"\xef\xbb\xbf" + content.encode())  # a byte-order mark does not count
    cut = list(pieces(path, size))
    assert "".join(piece.text for piece in cut) == content
    fractions = [piece.fraction for piece in cut]
    assert fractions == sorted(fractions) and fractions[-1] == 1.0


def test_windows_are_the_whole_text_without_gaps(text: Path) -> None:
    content = "".join(f"line {i} €\n" for i in range(20_000))
    text.write_bytes(content.encode())
    tokenizer = byte_tokenizer()
    expected = torch.tensor(tokenizer(content).input_ids)
    cut = list(windows(text, tokenizer, 1000))
    assert torch.equal(torch.cat([window.ids for window in cut]), expected[: len(expected) // 1000 * 1000])
    fractions = [window.fraction for window in cut]
    assert fractions == sorted(fractions) and 0 < fractions[0] < 0.02 and fractions[-1] > 0.98
    assert len(list(windows(text, tokenizer, 1000, max_tokens=3999))) == 3


def test_special_tokens_in_the_text_are_text(text: Path) -> None:
    text.write_text("a<|end|>b")
    assert torch.cat([window.ids for window in windows(text, byte_tokenizer(), 9)]).max() < 256


def test_the_start_token_is_used_where_the_tokenizer_uses_one(stories: Path, text: Path) -> None:
    assert start_token(byte_tokenizer()) is None  # it has one, but puts it nowhere
    tokenizer = AutoTokenizer.from_pretrained(stories)
    text.write_text("Once upon a time. " * 20)
    cut = list(windows(text, tokenizer, 16))
    plain = tokenizer(text.read_text(), add_special_tokens=False).input_ids
    assert [window.ids[0] for window in cut] == [tokenizer.bos_token_id] * (len(plain) // 15)
    assert torch.cat([window.ids[1:] for window in cut]).tolist() == plain[: len(plain) // 15 * 15]


def test_sentences_are_lines(text: Path) -> None:
    text.write_text("one\n\n  two  \r\nthree")
    assert [line for line, _ in sentences(text)] == ["one", "two", "three"]
    text.write_text("\n \n")
    with pytest.raises(TextError, match="only blank lines"):
        list(sentences(text))


def test_progress_follows_the_text() -> None:
    shares: list[float] = []
    table = Table(torch.zeros(4, 9))
    compare(table, table, random_windows(4, 4, 9), progress=shares.append)
    assert shares == [0.25, 0.5, 0.75, 1.0]
