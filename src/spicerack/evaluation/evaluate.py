"""What a quantized folder lost against the model it was made from: `evaluate` on two folders.

How it works. Language models are compared by their predictions on a text (`language.py`), encoders by their embeddings
of sentences (`encoder.py`): both models read the same tokens, and what is measured is how far the one's answers are
from the other's. The reference always computes in float32; the quantized model runs as it ships, in its own type and
with the kernels that it will run on, so that nothing is measured on a simulation. Beside it stands a noise floor: the
reference cast to bfloat16, measured in the same way, because a loss means little without one that everybody accepts.

What is given up. Both models are in memory at once, the reference in float32. A divergence of predictions says how much
was changed and not whether it matters for a task: that needs the task. Of a model that also sees or hears, text reaches
the language model alone, and a warning names the quantized layers that it does not reach.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spicerack.arguments import at_least, check_fields, checked
from spicerack.errors import UsageError
from spicerack.evaluation.encoder import EncoderComparison
from spicerack.evaluation.folder import check_sides, common_tokenizer, window_of
from spicerack.evaluation.intervals import Interval
from spicerack.evaluation.language import Comparison
from spicerack.evaluation.reference import (
    Pace,
    Reference,
    Text,
    warn_of_calibration_text,
    warn_of_unknown_tokens,
    warn_of_unreached_layers,
)  # fmt: skip
from spicerack.evaluation.report.examples import of_language
from spicerack.kernels import kernel
from spicerack.machine import devices
from spicerack.models.inputs import check_text, limits
from spicerack.models.kind import Kind, kind_of
from spicerack.models.opening import open_stored
from spicerack.nn.cache_segments import CacheScheme
from spicerack.nn.weight import PackedWeight
from spicerack.runtime.load import load
from spicerack.storage.files import locate

Progress = Callable[[str, float], None]
"""Called with what is being done and the share of it that is done, 0 to 1."""

HELDOUT = "heldout.txt"
"""A text in a model's folder that it was not trained on."""
CACHE_STEP = 16
"""Tokens that are read at once where the cache counts: about 32 of those before them are in float, as in generating."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationOptions:
    """What two folders are compared on, and how the models run.

    text        a file, a folder or a dataset, as for calibration; None: `heldout.txt` in the model's folder, or for
                encoders the built-in sentences
    window      tokens that are read together; None: 512 or the model's longest. Longer sentences are cut there
    max_tokens  tokens of the text that are used; None: all of it
    device      where both models run
    dtype       float type that the quantized folder computes in; None: its own, which is what ships
    engine      that its packed layers and attention run on, as in `load`; None: the fastest
    cache       bits of its key-value cache, as in `load`: it then reads 16 tokens at a time, the earlier ones through
                that cache; None: no cache is used
    trust_remote_code   whether code that came with the model may run
    """

    text: str | Path | None = None
    window: int | None = None
    max_tokens: int | None = None
    device: str = "cpu"
    dtype: torch.dtype | None = None
    engine: str | None = None
    cache: int | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        at_least(1, window=self.window, max_tokens=self.max_tokens)


_DEFAULTS = EvaluationOptions()


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The measured figures, and what they were measured with.

    kind         of both models
    compute      the kernel and type that the quantized model ran with
    text         name of the file, or "built-in sentences"
    figures      how far its predictions, or embeddings, are from the reference's
    floor        the reference in bfloat16 against itself in float32, as mean KL in nats per token (decoders) or mean
                 cosine (encoders), with its interval: what a plain cast costs. None where the model does not run in
                 bfloat16
    cache        bits of the quantized model's cache, None where it was not used
    kernels      kinds of packed layers, by their names with `*` for numbers; the kernel that each ran, and how many did
    examples     what the loss looks like, as JSON has it (`report.examples`, pairs of sentences); none unless asked for
    """

    kind: Kind
    compute: str
    text: str
    figures: Comparison | EncoderComparison
    floor: Interval | None
    cache: int | None = None
    kernels: tuple[tuple[str, str, int], ...] = ()
    examples: tuple[Mapping[str, Any], ...] = ()

    @property
    def noise_floor(self) -> float | None:
        """The noise floor without its interval."""
        return None if self.floor is None else self.floor.mean

    def as_dict(self) -> dict[str, Any]:
        """JSON, under the names of the command line's contract."""
        floor = "kl_noise_floor" if self.kind == "decoder" else "cosine_noise_floor"
        cache = {} if self.cache is None else {"cache": self.cache}
        figures = self.figures.as_dict()
        floors = {floor: self.noise_floor, f"{floor}_ci95": None if self.floor is None else self.floor.ends}
        return {"compute": self.compute, **cache, "text": self.text, **figures, **floors}


@checked
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

    folder, against     folders or hub ids
    text                a file, a folder or a dataset, as for calibration; None: `heldout.txt` in the model's folder, or
                        for encoders the built-in sentences
    window              tokens that are read together; None: 512 or the model's longest. Longer sentences are cut there
    max_tokens          tokens of the text that are used; None: all of it
    device              where both models run
    dtype               float type that `folder` computes in; None: its own, which is what ships
    engine              that it computes with, as in `load`
    cache               bits of its key-value cache; it then reads 16 tokens at a time, the earlier ones through that
                        cache
    trust_remote_code   whether code that came with the model may run
    progress            called with what is being done and the share of it, 0 to 1

    Raises TextError, UsageError, CheckpointError, LoadError.
    """
    options = EvaluationOptions(
        text=text, window=window, max_tokens=max_tokens, device=device, dtype=dtype, engine=engine, cache=cache,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    return measure(folder, against=against, options=options, progress=progress).as_dict()


@checked
def measure(
    folder: str | Path,
    *,
    against: str | Path,
    options: EvaluationOptions = _DEFAULTS,
    examples: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """As `evaluate`, keeping the figures of every window: `language.paired_difference` compares two of these.

    folder, against: folders or hub ids. examples: whether to keep passages, or sentences, that show the loss. Raises
    TextError, UsageError, CheckpointError, LoadError.
    """
    out, source = locate(folder), locate(against)
    kind = kind_of(open_stored(source).config, source)
    _check(options, kind, source)  # what is wrong is said before the long part
    check_sides(out, source, "eval")
    tokenizer = common_tokenizer(out, source, options.trust_remote_code)
    text = _text(kind, options.text, out, source)
    warn_of_calibration_text(text, tokenizer, kind, out)
    report = progress or (lambda _doing, _share: None)
    return compared(Sides(kind, out, source, tokenizer, text), options, report, examples=examples)


@dataclass(frozen=True, slots=True)
class Sides:
    """Two folders that can be compared, and what both read.

    kind         of both models
    out, source  the quantized folder, and the float model's
    tokenizer    of both
    text         what is read
    """

    kind: Kind
    out: Path
    source: Path
    tokenizer: PreTrainedTokenizerBase
    text: Text


def compared(
    sides: Sides,
    options: EvaluationOptions,
    report: Progress,
    *,
    pace: Pace = Pace(),  # noqa: B008  # frozen
    examples: bool = False,
) -> Evaluation:
    """Load both models of `sides` and compare them; options.text does not count. pace: when to end. examples: as in
    `measure`.

    Raises TextError, UsageError (also where `pace` is too short), CheckpointError, LoadError.
    """
    kind, source = sides.kind, sides.source
    device, trusted = options.device, options.trust_remote_code

    def original(dtype: torch.dtype) -> PreTrainedModel:
        report("loading", 0.0)
        return load(source, device=device, dtype=dtype, trust_remote_code=trusted)

    model = original(torch.float32)  # whatever it is stored in: what is lost is to be the quantized model's alone
    reached = check_text(model, head=kind == "decoder")
    window = pace.window(model, window_of(options.window, limits(model, model.config), source))
    reference = Reference(kind, model, sides.tokenizer, source, sides.text, window)
    # nothing holds the model in bfloat16 once it is measured: two are in memory, and not three
    cast, most = original(torch.bfloat16), options.max_tokens
    floor = reference.floor(cast, most, lambda share: report("noise floor", share), pace)
    del cast
    report("loading", 0.0)
    quantized = load(
        sides.out, device=device, dtype=options.dtype, engine=options.engine, cache=options.cache,
        trust_remote_code=trusted,
    )  # fmt: skip
    warn_of_unreached_layers(quantized, reached)
    step = None if options.cache is None else CACHE_STEP
    figures = reference.compare(quantized, most, lambda share: report("evaluating", share), pace, step=step)
    warn_of_unknown_tokens(figures.unknown_share)
    shown = _examples(reference, quantized, figures) if examples else ()
    return Evaluation(
        kind,
        compute(quantized),
        _name(sides.text),
        figures,
        _interval(floor),
        options.cache,
        _kernels(quantized),
        shown,
    )


def _examples(
    reference: Reference, quantized: PreTrainedModel, figures: Comparison | EncoderComparison
) -> tuple[Mapping[str, Any], ...]:
    """What the loss looks like."""
    if isinstance(figures, EncoderComparison):
        return tuple(asdict(pair) for pair in figures.moved)
    return tuple(of_language(reference.model, quantized, figures, reference.tokenizer))


def _kernels(model: PreTrainedModel) -> tuple[tuple[str, str, int], ...]:
    """Which kernel the packed layers of each kind run, and how many of them."""
    counts = Counter(
        (re.sub(r"\b\d+\b", "*", path.removesuffix(".packed")), module.choice.kernel.name)
        for path, module in model.named_modules()
        if isinstance(module, PackedWeight)
    )
    return tuple((layers, kernel_, count) for (layers, kernel_), count in sorted(counts.items()))


def _interval(floor: Comparison | EncoderComparison | None) -> Interval | None:
    """Of the noise floor."""
    if floor is None:
        return None
    return floor.kl_interval if isinstance(floor, Comparison) else floor.cosine_interval


def _name(text: Text) -> str:
    """What the text is called."""
    if isinstance(text, torch.Tensor):
        return "tokens"
    return "built-in sentences" if text is None else Path(text).name


def _check(options: EvaluationOptions, kind: Kind, source: Path) -> None:
    """Raises UsageError for a device or an engine that is not here, bits that no cache has, and a cache of an
    encoder."""
    kernel.check_engine(options.engine, options.device)
    devices.find(options.device, torch.float32)
    if options.cache is not None:
        CacheScheme(options.cache)
        if kind == "encoder":
            raise UsageError(f"{source} is an encoder: it has no cache to quantize", "leave the cache out")


def compute(model: PreTrainedModel) -> str:
    """Which kernels and type `model` computes with: `reference/bfloat16`; `torch/...` without packed weights."""
    kernels = {module.choice.kernel.name for module in model.modules() if isinstance(module, PackedWeight)}
    return f"{'+'.join(sorted(kernels)) or 'torch'}/{str(model.dtype).removeprefix('torch.')}"


def _text(kind: Kind, text: str | Path | None, out: Path, source: Path) -> str | Path | None:
    """The text to evaluate on; None for the built-in sentences. Raises UsageError where a decoder has none."""
    if text is not None:
        return text
    if kind == "encoder":
        return None
    for folder in (source, out):
        if (folder / HELDOUT).is_file():
            return folder / HELDOUT
    raise UsageError("no text to evaluate on", "give --text FILE: plain text that the model has not seen in training")
