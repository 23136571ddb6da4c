"""What a loss looks like, against the same computed the plain way: all logits at once, every passage, every pair."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LlamaFolder, byte_tokenizer
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import spicerack
from spicerack.evaluation import encoder
from spicerack.evaluation.evaluate import EvaluationOptions, measure
from spicerack.evaluation.intervals import Interval
from spicerack.evaluation.language import compare
from spicerack.evaluation.report import examples
from spicerack.text.windows import Window


@pytest.fixture
def models(llama_folder: LlamaFolder) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    ours = AutoModelForCausalLM.from_pretrained(llama_folder())
    theirs = copy.deepcopy(ours)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.03 * torch.randn_like(parameter)
    return ours, theirs


@torch.no_grad()
def test_passages(models: tuple[LlamaForCausalLM, LlamaForCausalLM]) -> None:
    torch.manual_seed(1)
    ids = torch.randint(32, 127, (5, 80))
    figures = compare(*models, [Window(row, 0, 1.0) for row in ids])
    shown = examples.of_language(*models, figures, byte_tokenizer())
    ours, theirs = (model(ids).logits[:, :-1].double().log_softmax(-1) for model in models)
    kl = (ours.exp() * (ours - theirs)).sum(-1)
    passages = {(w, b): float(kl[w, b : b + 24].mean()) for w in range(5) for b in (0, 24, 48)}
    ranked = sorted(passages, key=lambda place: passages[place])
    for example, place in zip(shown, (ranked[-1], ranked[len(ranked) // 2]), strict=True):
        window, begin = place
        assert example["kl"] == pytest.approx(passages[place], rel=1e-4)
        there = slice(begin, begin + 24)
        tokens = ids[window, 1:][there]
        assert [token["text"] for token in example["tokens"]] == [chr(int(t)) for t in _spelled(tokens)]
        firsts = [[chr(int(t)) for t in _spelled(x[window, there].argmax(-1))] for x in (ours, theirs)]
        same = [token["original"] == token["small"] for token in example["tokens"]]
        assert same == [a == b for a, b in zip(*firsts, strict=True)]
        at = int(kl[window, there].argmax())
        assert example["at"] == at
        for side, logits in (("original", ours), ("small", theirs)):
            top = logits[window, begin + at].exp().topk(5)
            assert [choice["share"] for choice in example[side]] == pytest.approx(top.values.tolist(), rel=1e-4)
        assert byte_tokenizer().decode(ids[window, : begin + 1][-48:]) == example["before"]
    given = ids[ranked[-1][0], : ranked[-1][1] + 25][-48:]
    written = models[1].generate(given[None], max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert shown[0]["small_writes"] == byte_tokenizer().decode(written[0, len(given) :])


def _spelled(tokens: torch.Tensor) -> list[int]:
    """Bytes of the tokens, which this tokenizer numbers in an order of its own."""
    tokenizer = byte_tokenizer()
    return [ord(tokenizer.decode([int(token)])[0]) for token in tokens]


def test_pairs() -> None:
    torch.manual_seed(0)
    before, after = (torch.randn(12, 8, dtype=torch.float64) for _ in range(2))
    similar = [encoder._pair_similarities(x) for x in (before, after)]
    moved = encoder._moved([f"s{i}" for i in range(12)], *similar)
    unit = [x / x.norm(dim=1, keepdim=True) for x in (before, after)]
    every = {
        (f"s{i}", f"s{j}"): (float(unit[0][i] @ unit[0][j]), float(unit[1][i] @ unit[1][j]))
        for i in range(12) for j in range(i + 1, 12)
    }  # fmt: skip
    ranked = sorted(every, key=lambda pair: -abs(every[pair][1] - every[pair][0]))
    assert [(pair.a, pair.b) for pair in moved] == [*ranked[:3], ranked[len(ranked) // 2]]
    assert [pair.typical for pair in moved] == [False, False, False, True]
    for pair in moved:
        assert (pair.before, pair.after) == pytest.approx(every[pair.a, pair.b])


def test_of_a_folder(llama_folder: LlamaFolder, tmp_path: Path) -> None:
    source, text = llama_folder(), tmp_path / "text.txt"
    text.write_text("".join(f"{i} and {i * i}; " for i in range(200)))
    spicerack.quantize(source, "w2g32", output=tmp_path / "out")
    options = EvaluationOptions(text=text, window=64)
    plain = measure(tmp_path / "out", against=source, options=options)
    shown = measure(tmp_path / "out", against=source, options=options, examples=True)
    assert plain.as_dict() == shown.as_dict() and not plain.examples
    assert [example["which"] for example in shown.examples] == ["worst", "typical"]
    kinds = {layers: count for layers, _, count in shown.kernels}
    assert kinds["model.layers.*.mlp.down_proj"] == 2 and sum(kinds.values()) == 14
    figures = plain.as_dict()
    # each window's share and loss, and what the intervals of their means are, with a t of 97.5 % from a table
    shares = plain.figures.agreed.numpy() / 63  # type: ignore[union-attr]
    half = 2.0195 * shares.std(ddof=1) / np.sqrt(42)
    assert len(shares) == 42
    assert figures["top1_agreement_ci95"] == pytest.approx([shares.mean() - half, shares.mean() + half], rel=1e-4)
    losses = plain.figures.nll.numpy()  # type: ignore[union-attr]
    half = 2.0195 * losses.std(ddof=1) / np.sqrt(42)
    ends = np.exp([losses.mean() - half, losses.mean() + half])
    assert figures["perplexity_ci95"] == pytest.approx(ends, rel=1e-4)
    assert Interval(0.9, 0.7, 1.2).within(0.0, 1.0).ends == [0.7, 1.0] and Interval(0.9, None, None).ends is None
