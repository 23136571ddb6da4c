"""Chat templates in the metadata of GGUF files: one without a name, and others with names.

Nothing is run here. A template is a program of a stranger, which transformers runs in a sandbox when a chat is
rendered; its name becomes a file's name when a tokenizer is saved, and is looked at for that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from spicerack.errors import CheckpointError
from spicerack.storage.gguf.metadata import Array, Entry, Metadata, Value
from spicerack.text.gguf.vocabulary import REMEDY

_KEY = "tokenizer.chat_template"
_NAMES = "tokenizer.chat_templates"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")
"""Letters that gguf-py leaves in names, and the hyphen; none that could lead out of a folder."""
_DEFAULT = "default"


def read_templates(metadata: Metadata) -> str | dict[str, str] | None:
    """The chat templates of a file as a tokenizer of transformers takes them: one, several by name, or none.

    Raises CheckpointError for one that is no text, and for a name that no file could have.
    """
    templates = {_DEFAULT: metadata.text(_KEY)} if _KEY in metadata else {}
    for key in metadata:
        if key.startswith(f"{_KEY}."):
            name = key.removeprefix(f"{_KEY}.")
            if not _NAME.fullmatch(name):
                raise CheckpointError(f"{metadata.where}: a chat template is called {name[:60]!r}", REMEDY)
            templates[name] = metadata.text(key)
    return templates[_DEFAULT] if list(templates) == [_DEFAULT] else templates or None


def templates_of(template: str | Mapping[str, str] | None) -> dict[str, Entry]:
    """The keys of a tokenizer's chat template, or of several. Raises CheckpointError for a name that is not read."""
    templates = {} if template is None else {_DEFAULT: template} if isinstance(template, str) else dict(template)
    entries: dict[str, Entry] = {}
    if _DEFAULT in templates:
        entries[_KEY] = Value("string", templates.pop(_DEFAULT))
    for name, text in templates.items():
        if not _NAME.fullmatch(name):
            raise CheckpointError(f"a chat template is called {name!r}", "give it a name of letters and digits")
        entries[f"{_KEY}.{name}"] = Value("string", text)
    if templates:
        entries[_NAMES] = Array.of("string", list(templates))
    return entries
