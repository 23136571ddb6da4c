"""What an evaluation reads of a model folder: tokenizer, pooling, and how many tokens to read together."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath

from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

from spicerack.errors import CheckpointError, UsageError
from spicerack.evaluation.encoder import Pooling, check_pooling
from spicerack.evaluation.sentences import SENTENCES
from spicerack.models.inputs import Limits
from spicerack.models.kind import MODULES, POOLING
from spicerack.models.opening import open_model, told_pooling
from spicerack.models.overview import refuse_sides, refuse_strangers
from spicerack.runtime import hf
from spicerack.storage import format as formats
from spicerack.storage.files import CONFIG, MAX_CONFIG_BYTES, read_json
from spicerack.storage.reader import Checkpoint
from spicerack.text.tokenizer import read_tokenizer

DEFAULT_WINDOW = 512
"""Tokens that are read together where a model has room for more: long enough that most have a context, and the same for
all models, so that figures can be compared."""
_SENTENCE_CONFIG = "sentence_bert_config.json"
"""sentence-transformers' file that may name a shorter limit than the model's positions."""
_OLD_POOLING = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "lasttoken",
}
"""Switches of sentence-transformers before version 5 -> the names that it has for them since."""


def pooling_of(folder: Path) -> Pooling:
    """How a sentence-transformers folder makes one vector of a sentence; mean where nothing is said.

    Raises UsageError for a pooling that is not computed here, CheckpointError for files that are damaged.
    """
    if folder.is_file():
        return check_pooling(told_pooling(folder) or "mean")
    path = folder / _pooling_folder(folder) / CONFIG
    if not path.is_file():
        return "mean"
    config = read_json(path, MAX_CONFIG_BYTES)
    chosen = config.get("pooling_mode")
    if chosen is None:  # before sentence-transformers 5: one switch each
        chosen = [_OLD_POOLING.get(key, key) for key, on in config.items() if key.startswith("pooling_mode_") and on]
    if isinstance(chosen, list):
        chosen = "+".join(str(part) for part in chosen) or "mean"
    return check_pooling(str(chosen))


def _pooling_folder(folder: Path) -> str:
    """The name of the folder inside `folder` that describes the pooling.

    A stranger's file says it: what is not a plain name could lead anywhere, and is refused by CheckpointError.
    """
    path = folder / MODULES
    if not path.is_file():
        return POOLING
    try:
        listed = json.loads(path.read_bytes()[:MAX_CONFIG_BYTES])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}", "fetch the file again") from error
    for module in listed if isinstance(listed, list) else []:
        if isinstance(module, dict) and str(module.get("type")).endswith("Pooling"):
            name = str(module.get("path"))
            if PurePosixPath(name).name == name and "\\" not in name:
                return name
            raise CheckpointError(f"{path}: {name!r} is not a folder beside it", "do not trust this folder")
    return POOLING


def window_of(asked: int | None, limits: Limits, folder: Path) -> int:
    """Tokens to read together: as asked if there is room, else 512 or the most there is room for.

    limits: of the model; folder: where it is from, which may name a lower one for sentences. Raises UsageError where
    there is no room for what was asked.
    """
    if asked is not None:
        limits.check_length(asked, "--window")
        return asked
    lengths = [DEFAULT_WINDOW, limits.positions or DEFAULT_WINDOW]
    if (folder / _SENTENCE_CONFIG).is_file():
        longest = read_json(folder / _SENTENCE_CONFIG, MAX_CONFIG_BYTES).get("max_seq_length")
        lengths += [longest] if isinstance(longest, int) and longest > 1 else []
    return min(lengths)


def check_sides(out: Path, source: Path, command: str) -> None:
    """Raises UsageError where `source`, which is to be the float model, is quantized itself, or is another model's.

    out: the folder that is compared with it. command: which of ours does it, for the line that would be right.
    """
    quantized, original = open_model(out), open_model(source)
    if _is_quantized(original):
        refuse_sides(out, source, command, swapped=not _is_quantized(quantized))
    refuse_strangers(quantized, original)


def _is_quantized(checkpoint: Checkpoint) -> bool:
    """Whether there is a float model that it was made from; a release in FP8 or MXFP4 is the finest that there is."""
    return formats.of_folder(checkpoint) is not None


def common_tokenizer(out: Path, source: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of the folder `source`, after a check that the folder `out` has the same, or none.

    The same are two that have one vocabulary and make the same tokens of the built-in sentences. Raises UsageError if
    they differ, CheckpointError if there is none, UntrustedCodeError if it is code.
    """
    config = _config(source, trust_remote_code)
    ours = read_tokenizer(source, config, trust_remote_code=trust_remote_code)
    if out == source or not (out.is_file() or any(out.glob("tokenizer*"))):
        return ours
    theirs = read_tokenizer(out, config, trust_remote_code=trust_remote_code)
    probe = " ".join(SENTENCES)
    if (
        (not out.is_file() and ours.get_vocab() != theirs.get_vocab())  # a file has names for unused tokens, too
        or ours(probe, verbose=False).input_ids != theirs(probe, verbose=False).input_ids
    ):
        raise UsageError(
            f"the tokenizers of {out} and {source} differ",
            "compare a quantized folder with the model that it was made from",
        )
    return ours


def _config(source: Path, trust_remote_code: bool) -> PreTrainedConfig:
    """transformers' config of a float model. Raises CheckpointError."""
    if source.is_file():
        return hf.config_and_class(open_model(source).config, source)[0]
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{source}: config.json cannot be read: {error}", "is it a model's folder?") from error
    return config
