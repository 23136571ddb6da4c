"""The demo: two real models through the whole way, INT8 and INT4, ending in one honest table per model.

Everything in the table is measured here and now, on the folders that were written: nothing is quoted. Each way to
quantize a model goes through the same four stations as a user's own model would: `quantize` writes a folder, `measure`
compares its predictions with the original's, `bench` times both in turns, and a sample lets a person look. The figures
of the original are those of the first of these runs.

What is given up. Few rounds and a short text, so that the whole demo takes minutes: intervals are wider than those of
the commands' defaults.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spicerack.evaluation.bench import BenchOptions, bench
from spicerack.evaluation.encoder import embed, tokens_of
from spicerack.evaluation.evaluate import Evaluation, EvaluationOptions, measure
from spicerack.evaluation.folder import pooling_of
from spicerack.evaluation.language import Comparison
from spicerack.evaluation.sentences import SENTENCES
from spicerack.evaluation.timing import Timing
from spicerack.models import bundled
from spicerack.planning.mix.face import quantize
from spicerack.runtime.generate import GenerateOptions, generate
from spicerack.runtime.load import load
from spicerack.storage import ledger
from spicerack.text.tokenizer import read_tokenizer

PROMPT = 'def read_csv(path):\n    """'
"""What the language model continues: Python, which it was trained on, at a place where only prose can follow."""
QUESTION = "How can I get back into my account?"
"""What the encoder finds the nearest of the built-in sentences to."""
NEW_TOKENS = 16
"""Tokens of a continuation: one line of the terminal."""
EVALUATED_TOKENS = 30_000
"""Of the held-out text: enough for a narrow interval, and soon read."""
_REPEATS = 3
"""Rounds of the benchmark: a demo is not waited for longer."""
_LENGTH = 128
"""Tokens of a sentence, at most, where the nearest one is looked for."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to quantize a model: what the table calls it, its scheme, and rules for some layers."""

    label: str
    scheme: str
    rules: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Subject:
    """A model of the demo.

    title      what it is, in a line for people
    folder     where it lies; it is not changed
    decoder    whether it continues text; else it is an encoder of sentences
    variants   the ways to quantize it, in the order of the table
    """

    title: str
    folder: Path
    decoder: bool
    variants: tuple[Variant, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a model in one way, or of the original.

    label        what the table calls it
    layer_bytes  of the layers that are quantized; codes, scales and zeros included
    timing       sizes and speeds
    original     the original's, from the same turns: what this speed is beside, whatever else the machine had to do
    evaluation   what was lost; None of the original
    perplexity   of a decoder; None of an encoder
    sample       what a person would look at: a continuation, or the sentence nearest to a question
    """

    label: str
    layer_bytes: int
    timing: Timing
    original: Timing
    evaluation: Evaluation | None
    perplexity: float | None
    sample: str

    def as_dict(self) -> dict[str, Any]:
        """JSON: the names of `bench` and of `eval`, and label, layer_bytes and sample beside them."""
        if self.evaluation is not None:
            figures = self.evaluation.as_dict()
        else:
            figures = {} if self.perplexity is None else {"perplexity": self.perplexity}
        own = {"label": self.label, "layer_bytes": self.layer_bytes, "sample": self.sample}
        return {**self.timing.as_dict(), **figures, **own}


def subjects() -> tuple[Subject, ...]:
    """The demo's models: an encoder and a decoder. Raises CheckpointError if one is not installed.

    Embeddings are half of the one and a quarter of the other, and stay in float by default: each model has ways that
    round them, too.
    """
    embeddings = ("model.embed_tokens=w8",)
    words = ("embeddings.word_embeddings=w8",)
    return (
        Subject(
            "all-MiniLM-L6-v2, a sentence encoder",
            bundled.encoder(),
            False,
            (
                Variant("w8", "w8"),
                Variant("w4g32z", "w4g32z"),
                Variant("w8, emb. w8", "w8", words),
                Variant("w4g32z, emb. w8", "w4g32z", words),
            ),
        ),
        Subject(
            "stdlib-lm, a small language model of Python's standard library",
            bundled.language_model(),
            True,
            (
                Variant("w8", "w8"),
                Variant("w4g128", "w4g128"),
                Variant("w4g32z", "w4g32z"),
                Variant("w4g32z, emb. w8", "w4g32z", embeddings),
            ),
        ),
    )


def run(subject: Subject, output: Path, report: Callable[[str], None]) -> list[Outcome]:
    """Quantize, evaluate, time and sample: an outcome of the original, and one of each way, in their order.

    subject: the model, and the ways. output: a folder that each way gets a folder in; those must not exist. report:
    called with what is being done, a line for people. Raises what `quantize`, `measure` and `bench` raise.
    """
    outcomes: list[Outcome] = []
    for variant in subject.variants:
        name = f"{subject.title.partition(',')[0]}, {variant.label}"  # the folder of one is called "model"
        folder = output / variant.label.replace(", ", "+").replace(" ", "").replace(".", "")
        report(f"{name}: quantizing")
        quantize(subject.folder, variant.scheme, output=folder, rules=variant.rules)
        before, after = _layer_bytes(folder)
        report(f"{name}: evaluating")
        most = EVALUATED_TOKENS if subject.decoder else None
        evaluation = measure(folder, against=subject.folder, options=EvaluationOptions(max_tokens=most))
        report(f"{name}: measuring speed")
        timed = bench(folder, against=subject.folder, options=BenchOptions(repeats=_REPEATS))
        report(f"{name}: sampling")
        now, then = _perplexities(evaluation)
        if not outcomes:
            sample = _sample(subject, subject.folder)
            outcomes.append(Outcome("original", before, timed.original, timed.original, None, then, sample))
        sample = _sample(subject, folder)
        outcomes.append(Outcome(variant.label, after, timed.quantized, timed.original, evaluation, now, sample))
    return outcomes


def _perplexities(evaluation: Evaluation) -> tuple[float | None, float | None]:
    """Of the quantized model and of the original; None of encoders."""
    figures = evaluation.figures
    if not isinstance(figures, Comparison):
        return None, None
    return figures.perplexity, figures.perplexity_reference


def _layer_bytes(folder: Path) -> tuple[int, int]:
    """Bytes before and after of the linear layers that are quantized, from the folder's own ledger.

    Embeddings are left out, quantized or not: they count in the folder's size only, and would hide what a scheme does.
    """
    written = ledger.read(folder)
    assert written is not None, "quantized just now"
    layers = [e for e in written.entries if e.action == "quantize" and "embed" not in e.layer_type]
    return sum(e.bytes_before for e in layers), sum(e.bytes_after for e in layers)


def _sample(subject: Subject, folder: Path) -> str:
    """What a person would look at: a continuation of the prompt, or the built-in sentence nearest to the question.

    The latter with its cosine, to three digits. The model is loaded as its users load it, with its own pooling.
    """
    if subject.decoder:
        return generate(folder, PROMPT, GenerateOptions(max_new_tokens=NEW_TOKENS)).text
    model = load(folder)
    tokenizer = read_tokenizer(folder, model.config)
    with torch.no_grad():
        vectors = embed(model, *tokens_of(tokenizer, [QUESTION, *SENTENCES], _LENGTH), pooling_of(folder))
    question, *others = torch.nn.functional.normalize(vectors)
    scores = torch.stack(others) @ question
    return f"{SENTENCES[int(scores.argmax())]} ({float(scores.max()):.3f})"
