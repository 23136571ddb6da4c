"""A plug-in that lies elsewhere: what proves that a new scheme, format or kernel is one file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from spicerack import plugins


@contextmanager
def dropped(package: ModuleType, folder: Path, name: str, source: str) -> Iterator[None]:
    """`package` with one file more, `name`.py in `folder`, for the length of a `with` statement."""
    (folder / f"{name}.py").write_text(source)
    package.__path__.append(str(folder))
    plugins.names.cache_clear()
    try:
        yield
    finally:
        package.__path__.remove(str(folder))
        plugins.names.cache_clear()
        sys.modules.pop(f"{package.__name__}.{name}", None)
