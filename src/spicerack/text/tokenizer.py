"""The tokenizer of a model folder, read without guessing and without running its code.

transformers finds a class by the config's `model_type`; a quantized folder of our own has another there, so that the
float model's config is handed in.
"""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from spicerack.errors import CheckpointError, UntrustedCodeError
from spicerack.storage.gguf.reader import GgufFile
from spicerack.text.gguf import tokenizer_of_gguf

_DAMAGED = (AttributeError, LookupError, OSError, TypeError, ValueError)
"""What is raised where files have not what they should have."""


def read_tokenizer(
    folder: Path, config: PreTrainedConfig, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`, or in a .gguf file; nothing is fetched.

    config: of the float model: transformers chooses the tokenizer's class by it, and need not know what our own folders
    say. Raises CheckpointError if there is no tokenizer, UntrustedCodeError if it is code that is not trusted.
    """
    if folder.is_file():  # a GGUF file, which has it inside
        return tokenizer_of_gguf(GgufFile.open(folder).metadata)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, config=config, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:
        if type(error) is not Exception and not isinstance(error, _DAMAGED):  # what tokenizers raises
            raise
        if "trust_remote_code" in str(error):
            raise UntrustedCodeError(
                f"{folder}: reading its tokenizer would run code that came with the model",
                "pass --trust-remote-code if you trust it",
            ) from error
        # transformers' first line ends where its list of ways begins, which are not of use here
        reason = str(error).strip().split("\n")[0].rstrip().removesuffix("from one of:").rstrip()
        if not isinstance(error, OSError | ValueError) or not reason:  # of files that have not what they should have
            reason = f"{type(error).__name__} {reason}".rstrip()
        raise CheckpointError(
            f"{folder} has no tokenizer: {reason}", "add the model's tokenizer files, or fetch them again"
        ) from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer
