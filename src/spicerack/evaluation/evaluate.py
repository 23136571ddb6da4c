"""What a quantized folder lost against the model it was made from: `evaluate` on two folders.

Language models are compared by their predictions on a text (`evaluation_lm`), encoders by their embeddings of sentences
(`evaluation_encoder`). The reference always computes in float32; the quantized model runs as it ships.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spicerack.errors import UsageError
from spicerack.evaluation import encoder, language
from spicerack.evaluation import folder as evaluation_folder
from spicerack.evaluation.encoder import EncoderComparison
from spicerack.evaluation.language import Comparison
from spicerack.evaluation.sentences import SENTENCES
from spicerack.kernels import kernel
from spicerack.models.kind import Kind, kind_of
from spicerack.nn.cache_blocks import CacheScheme
from spicerack.nn.weight import PackedWeight
from spicerack.runtime.load import load
from spicerack.storage import ledger
from spicerack.storage.files import CONFIG, MAX_CONFIG_BYTES, locate, read_json
from spicerack.text.pieces import sentences, windows

Progress = Callable[[str, float], None]
"""Called with what is being done and the share of it that is done, 0 to 1."""

HELDOUT = "heldout.txt"
FLOOR_TOKENS = 8192
"""The noise floor is measured on the beginning of the text: it varies little, and bfloat16 is slow on many CPUs."""
UNKNOWN_LIMIT = 0.01
CACHE_STEP = 16
"""Tokens that are read at once where the cache counts: about 32 of those before them are in float, as in generating."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The measured figures, and what they were measured with.

    compute: the kernel and type that the quantized model ran with. noise_floor: the reference in bfloat16 against
    itself in float32, as mean KL in nats per token (decoders) or mean cosine (encoders): what a plain cast costs.
    cache: bits of the quantized model's cache, None where it was not used.
    """

    kind: Kind
    compute: str
    text: str
    figures: Comparison | EncoderComparison
    noise_floor: float
    cache: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON, under the names of the command line's contract."""
        floor = "kl_noise_floor" if self.kind == "decoder" else "cosine_noise_floor"
        cache = {} if self.cache is None else {"cache": self.cache}
        figures = self.figures.as_dict()
        return {"compute": self.compute, **cache, "text": self.text, **figures, floor: self.noise_floor}


def evaluate(
    folder: str | Path,
    *,
    against: str | Path,
    text: str | Path | None = None,
    window: int | None = None,
    max_tokens: int | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    engine: str | None = None,
    cache: int | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """What `folder` lost `against` the model it was made from -> the figures of `spicerack eval --json`.

    text: a file; None is `heldout.txt` in the model's folder, or for encoders the built-in sentences. window: tokens
    that are read together, None is 512 or the model's longest; longer sentences are cut there. max_tokens: None is the
    whole text. dtype: float type that `folder` computes in; None is its own, which is what ships. engine: that it
    computes with, as in `load`. cache: bits of its key-value cache; it then reads 16 tokens at a time, and the earlier
    ones through that cache. Raises TextError, UsageError, CheckpointError, LoadError.
    """
    return measure(
        folder,
        against=against,
        text=text,
        window=window,
        max_tokens=max_tokens,
        device=device,
        dtype=dtype,
        engine=engine,
        cache=cache,
        trust_remote_code=trust_remote_code,
        progress=progress,
    ).as_dict()


def measure(
    folder: str | Path,
    *,
    against: str | Path,
    text: str | Path | None = None,
    window: int | None = None,
    max_tokens: int | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    engine: str | None = None,
    cache: int | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """As `evaluate`, keeping the figures of every window: `evaluation_lm.paired_difference` compares two of these."""
    out, source = locate(folder), locate(against)
    kind = kind_of(read_json(source / CONFIG, MAX_CONFIG_BYTES), source)
    kernel.check_engine(engine, device)  # what is wrong is said before the long part
    if cache is not None:
        CacheScheme(cache)
        if kind == "encoder":
            raise UsageError(f"{source} is an encoder: it has no cache to quantize", "leave the cache out")
    tokenizer = evaluation_folder.tokenizer(out, source, trust_remote_code)
    path = _text(kind, text, out, source)
    written = ledger.read(out)
    if path is not None and written is not None and written.calibration_text == (_sha256(path) or ""):
        warnings.warn(f"{path} is what {out} was calibrated with: use another text, this one flatters", stacklevel=2)
    report = progress or (lambda _doing, _share: None)

    def original(dtype: torch.dtype) -> PreTrainedModel:
        report("loading", 0.0)
        return load(source, device=device, dtype=dtype, trust_remote_code=trust_remote_code)

    reference = original(torch.float32)
    length = evaluation_folder.window(window, reference, source)

    def compare(
        other: PreTrainedModel, most: int | None, doing: str, step: int | None = None
    ) -> Comparison | EncoderComparison:
        def share(done: float) -> None:
            report(doing, done)

        if path is not None and kind == "decoder":
            texts = windows(path, tokenizer, length, most)
            return language.compare(reference, other, texts, progress=share, step=step)
        return _compare_encoders(reference, other, tokenizer, path, source, length, most, share)

    beginning = max(FLOOR_TOKENS, length)
    floor = compare(
        original(torch.bfloat16),
        beginning if max_tokens is None else min(beginning, max_tokens),
        "noise floor",
    )
    report("loading", 0.0)
    quantized = load(out, device=device, dtype=dtype, engine=engine, cache=cache, trust_remote_code=trust_remote_code)
    figures = compare(quantized, max_tokens, "evaluating", None if cache is None else CACHE_STEP)
    if figures.unknown_share > UNKNOWN_LIMIT:
        unknown = f"{figures.unknown_share:.1%} of the text's tokens are unknown to the tokenizer"
        warnings.warn(f"{unknown}: is it in a language that the model knows?", stacklevel=2)
    name = "built-in sentences" if path is None else path.name
    return Evaluation(kind, compute(quantized), name, figures, floor.mean, cache)


def compute(model: PreTrainedModel) -> str:
    """Which kernels and type `model` computes with: `reference/bfloat16`; `torch/...` without packed weights."""
    kernels = {module.choice.kernel.name for module in model.modules() if isinstance(module, PackedWeight)}
    return f"{'+'.join(sorted(kernels)) or 'torch'}/{str(model.dtype).removeprefix('torch.')}"


def _compare_encoders(
    reference: PreTrainedModel,
    other: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path | None,
    source: Path,
    length: int,
    most: int | None,
    progress: encoder.Progress,
) -> EncoderComparison:
    builtin = ((text, i / len(SENTENCES)) for i, text in enumerate(SENTENCES, start=1))
    return encoder.compare(
        reference,
        other,
        tokenizer,
        builtin if path is None else sentences(path),
        pooling=evaluation_folder.pooling(source),
        length=length,
        max_tokens=most,
        progress=progress,
    )


def _sha256(path: Path) -> str | None:
    """Of a file; None where there is none, which is told later."""
    if not path.is_file():
        return None
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _text(kind: Kind, text: str | Path | None, out: Path, source: Path) -> Path | None:
    """The text to evaluate on; None for the built-in sentences."""
    if text is not None:
        return Path(text).expanduser()
    if kind == "encoder":
        return None
    for folder in (source, out):
        if (folder / HELDOUT).is_file():
            return folder / HELDOUT
    raise UsageError("no text to evaluate on", "give --text FILE: plain text that the model has not seen in training")
