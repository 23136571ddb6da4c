"""What a quantized folder lost against the model it was made from: `evaluate` on two folders.

Language models are compared by their predictions on a text (`evaluate_lm`), encoders by their embeddings of sentences
(`evaluate_encoder`). The reference always computes in float32; the quantized model runs as it ships.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from spicerack import evaluate_encoder, evaluate_lm
from spicerack.checkpoint.files import CONFIG, MAX_CONFIG_BYTES, locate, read_json
from spicerack.errors import CheckpointError, UntrustedCodeError, UsageError
from spicerack.evaluate_encoder import EncoderComparison, Pooling
from spicerack.evaluate_lm import Comparison
from spicerack.evaluate_sentences import SENTENCES
from spicerack.evaluate_text import sentences, windows
from spicerack.load import load

Progress = Callable[[str, float], None]
"""Called with what is being done and the share of it that is done, 0 to 1."""
Kind = Literal["decoder", "encoder"]

HELDOUT = "heldout.txt"
DEFAULT_WINDOW = 512
_UNKNOWN_LIMIT = 0.01
_TOKENIZER_PROBE = 20_000
_DECODERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The measured figures, and what they were measured with.

    compute: the kernel and type that the quantized model ran with. noise_floor: the reference in bfloat16 against itself in
    float32: mean KL in nats per token, or mean cosine.
    """

    kind: Kind
    compute: str
    text: str
    figures: Comparison | EncoderComparison
    noise_floor: float

    def as_dict(self) -> dict[str, Any]:
        """JSON, under the names of the command line's contract."""
        floor = "kl_noise_floor" if self.kind == "decoder" else "cosine_noise_floor"
        return {"compute": self.compute, "text": self.text, **self.figures.as_dict(), floor: self.noise_floor}


def evaluate(
    folder: str | Path,
    *,
    against: str | Path,
    text: str | Path | None = None,
    window: int | None = None,
    max_tokens: int | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """What `folder` lost `against` the model it was made from -> the figures of `spicerack eval --json`.

    text: a file; None is `heldout.txt` in the model's folder, or for encoders the built-in sentences. window: tokens that
    are read together, None is 512 or the model's longest; for encoders, where longer sentences are cut. Raises TextError,
    UsageError, CheckpointError, LoadError.
    """
    return measure(
        folder,
        against=against,
        text=text,
        window=window,
        max_tokens=max_tokens,
        device=device,
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
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """As `evaluate`, with the figures of every window: two of these can be compared by `evaluate_lm.paired_difference`."""
    out, source = locate(folder), locate(against)
    config = read_json(source / CONFIG, MAX_CONFIG_BYTES)
    what = kind(config, source)
    tokenizer = _tokenizers(out, source, trust_remote_code)
    path = _text(what, text, out, source)
    report = progress or (lambda _what, _share: None)

    def open_model(where: Path, dtype: torch.dtype | None) -> PreTrainedModel:
        return load(where, device=device, dtype=dtype, trust_remote_code=trust_remote_code).eval()

    report("loading", 0.0)
    reference = open_model(source, torch.float32)
    length = _window(window, reference, tokenizer, source)

    def compare(other: PreTrainedModel, doing: str) -> Comparison | EncoderComparison:
        def share(done: float) -> None:
            report(doing, done)

        if what == "encoder":
            return evaluate_encoder.compare(
                reference,
                other,
                tokenizer,
                _builtin() if path is None else sentences(path),
                pooling=pooling(source),
                length=length,
                max_tokens=max_tokens,
                progress=share,
            )
        assert path is not None
        most = max_tokens if doing == "evaluating" else min(max_tokens or _FLOOR * length, _FLOOR * length)
        return evaluate_lm.compare(reference, other, windows(path, tokenizer, length, most), progress=share)

    floor = compare(open_model(source, torch.bfloat16), "noise floor")
    quantized = open_model(out, None)
    figures = compare(quantized, "evaluating")
    if figures.as_dict()["unknown_tokens"] > _UNKNOWN_LIMIT:
        warnings.warn(
            f"{figures.as_dict()['unknown_tokens']:.1%} of the tokens are unknown to the tokenizer: is the text in its language?",
            stacklevel=2,
        )
    level = floor.kl.mean() if isinstance(floor, Comparison) else floor.cosine.mean()
    return Evaluation(what, compute(quantized), "built-in sentences" if path is None else path.name, figures, float(level))


_FLOOR = evaluate_lm.FLOOR_WINDOWS


def kind(config: dict[str, Any], folder: Path) -> Kind:
    """Whether a model folder holds a decoder (it predicts tokens) or an encoder (it embeds text). Raises UsageError."""
    if config.get("is_encoder_decoder"):
        raise UsageError(
            f"{folder} is an encoder-decoder model", "only decoder language models and text encoders can be evaluated so far"
        )
    declared = config.get("architectures")
    name = str(declared[0]) if isinstance(declared, list) and declared else ""
    if (folder / "modules.json").is_file() or (folder / "1_Pooling").is_dir():
        return "encoder"
    return "decoder" if name.endswith(_DECODERS) else "encoder"


def pooling(folder: Path) -> Pooling:
    """How a sentence-transformers folder makes one vector of a sentence; mean where nothing is said. Raises UsageError."""
    path = folder / _pooling_folder(folder) / CONFIG
    if not path.is_file():
        return "mean"
    config = read_json(path, MAX_CONFIG_BYTES)
    chosen = config.get("pooling_mode")
    if chosen is None:  # before sentence-transformers 5: one switch each
        old = {"cls_token": "cls", "mean_tokens": "mean", "max_tokens": "max"}
        chosen = [old.get(key[13:], key[13:]) for key, on in config.items() if key.startswith("pooling_mode_") and on]
    if isinstance(chosen, list):
        chosen = "+".join(str(part) for part in chosen) or "mean"
    return evaluate_encoder.check_pooling(str(chosen))


def _pooling_folder(folder: Path) -> str:
    path = folder / "modules.json"
    if not path.is_file():
        return "1_Pooling"
    try:
        listed = json.loads(path.read_bytes()[:MAX_CONFIG_BYTES])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}", "fetch the file again") from error
    for module in listed if isinstance(listed, list) else []:
        if isinstance(module, dict) and str(module.get("type")).endswith("Pooling"):
            name = str(module.get("path"))
            if PurePosixPath(name).name == name:
                return name
            raise CheckpointError(f"{path}: {name!r} is not a folder beside it", "do not trust this folder")
    return "1_Pooling"


def compute(model: PreTrainedModel) -> str:
    """Which kernel and type `model` runs with, such as `reference/bfloat16`; `torch/...` for a float model."""
    return f"reference/{str(model.dtype).removeprefix('torch.')}"


def _builtin() -> Iterable[tuple[str, float]]:
    return [(text, i / len(SENTENCES)) for i, text in enumerate(SENTENCES, start=1)]


def _text(what: Kind, text: str | Path | None, out: Path, source: Path) -> Path | None:
    if text is not None:
        return Path(text).expanduser()
    if what == "encoder":
        return None
    for folder in (source, out):
        if (folder / HELDOUT).is_file():
            return folder / HELDOUT
    raise UsageError("no text to evaluate on", "give --text FILE: plain text that the model has not seen in training")


def _window(asked: int | None, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> int:
    """Tokens per window: as asked, if the model has that many positions."""
    positions: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)  # state spaces: none
    own = folder / "sentence_bert_config.json"
    limits = [DEFAULT_WINDOW, *([positions] if positions else [])]
    if own.is_file():
        longest = read_json(own, MAX_CONFIG_BYTES).get("max_seq_length")
        limits += [longest] if isinstance(longest, int) and longest > 0 else []
    if asked is None:
        return min(limits)
    if positions is not None and asked > positions:
        raise UsageError(f"--window {asked}: the model has {positions} positions", f"use --window {positions} or less")
    return asked


def _tokenizers(out: Path, source: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The reference's tokenizer, after a check that the quantized folder has the same (or none of its own)."""
    tokenizer = _tokenizer(source, source, trust_remote_code)
    if not any(out.glob("tokenizer*")) or out == source:
        return tokenizer
    other = _tokenizer(out, source, trust_remote_code)
    probe = " ".join(SENTENCES)[:_TOKENIZER_PROBE]
    same_words = tokenizer.get_vocab() == other.get_vocab()
    if not same_words or tokenizer(probe).input_ids != other(probe).input_ids:
        raise UsageError(
            f"the tokenizers of {out} and {source} differ", "compare a quantized folder with the model it was made from"
        )
    return tokenizer


def _tokenizer(folder: Path, config_from: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(config_from, trust_remote_code=trust_remote_code)
        made = AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise UntrustedCodeError(
                f"{folder}: its tokenizer is code that came with the model", "pass --trust-remote-code if you trust it"
            ) from error
        raise CheckpointError(f"{folder}: no tokenizer could be read: {error}", "add the model's tokenizer files") from error
    assert isinstance(made, PreTrainedTokenizerBase)
    return made
