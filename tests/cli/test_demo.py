"""The demo's models and what its tables must show."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

import spicerack
from spicerack.cli._demo import Subject, Variant, run, subjects
from spicerack.evaluation import language
from spicerack.evaluation.encoder import EncoderComparison
from spicerack.evaluation.evaluate import HELDOUT
from spicerack.evaluation.language import paired_difference
from spicerack.models.bundled import encoder, language_model
from spicerack.text.windows import windows


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "share", "cosine"), [("w8", 0.27, 0.999), ("w4g32z", 0.16, 0.97)])
def test_the_encoder_keeps_its_promises(tmp_path: Path, scheme: str, share: float, cosine: float) -> None:
    """Bytes of codes, scales and zeros over the float32 bytes of the same layers; 80 varied sentences."""
    subject = Subject("MiniLM", encoder(), False, (Variant(scheme, scheme),))
    original, quantized = run(subject, tmp_path, lambda doing: None)
    assert quantized.layer_bytes <= share * original.layer_bytes
    assert quantized.evaluation is not None
    figures = quantized.evaluation.figures
    assert isinstance(figures, EncoderComparison)
    assert len(figures.cosine) >= 64 and figures.mean >= cosine
    assert quantized.timing.bytes_on_disk < original.timing.bytes_on_disk and quantized.sample
    shown = quantized.as_dict()
    assert shown["cosine_mean"] == figures.mean and shown["label"] == scheme and "cosine_mean" not in original.as_dict()


@pytest.fixture(scope="module")
def reference() -> PreTrainedModel:
    return spicerack.load(language_model(), dtype=torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["w8", "w4g32z", "w2g32h"])
def test_opt_is_no_worse_than_absmax(tmp_path: Path, scheme: str, reference: PreTrainedModel) -> None:
    """Mean KL on held-out text, beyond the 95 % interval paired over windows; more in docs/quantization/quality.md."""
    figures = {}
    tokenizer = AutoTokenizer.from_pretrained(language_model())
    for range_ in ("opt", "absmax"):
        spicerack.quantize(language_model(), scheme, output=tmp_path / range_, range_=range_)
        small = spicerack.load(tmp_path / range_, dtype=torch.float32)
        text = windows(language_model() / HELDOUT, tokenizer, 512, 4096)
        figures[range_] = language.compare(reference, small, text)
    difference = paired_difference(figures["opt"], figures["absmax"])
    assert difference.lo is not None and difference.lo <= 0
    assert 0 < figures["opt"].mean < (0.001 if scheme == "w8" else 2.0)


def test_every_way_in_the_demo_can_be_planned() -> None:
    from spicerack.numerics.scheme import parse
    from spicerack.quantization.job import prepare
    from spicerack.quantization.recipe import Recipe, rule

    for subject in subjects():
        for variant in subject.variants:
            job = prepare(subject.folder, Recipe(parse(variant.scheme)).then(map(rule, variant.rules)))
            assert job.bytes_after < job.bytes_before
            embeddings = [a for a in job.actions if a.stored is not None and a.role == "embedding"]
            assert len(embeddings) == len(variant.rules)


def test_the_language_model_is_what_its_page_says() -> None:
    from spicerack.storage.reader import Checkpoint

    tensors = Checkpoint.open(language_model()).tensors
    assert sum(t.numel for t in tensors.values()) == 4_458_752
    assert {t.dtype for t in tensors.values()} == {"BF16"}
    assert all(size % 256 == 0 for t in tensors.values() for size in t.shape)
    assert sum(path.stat().st_size for path in language_model().iterdir()) <= 10_000_000
    for name in ("heldout.txt", "calibration.txt"):
        assert 100_000 < (language_model() / name).stat().st_size <= 500_000
