"""Plug-ins by file name: `schemes/nf4.py` is the scheme `nf4`, on the command line, in tests and in the docs.

A plug-in module says what it is in one public constant (`SCHEME`, `FORMAT`, `SOLVER` ...). It is imported when it is
asked for, never before.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import Any


@cache
def names(package: str) -> tuple[str, ...]:
    """Names of the plug-ins in `spicerack.<package>`, sorted, without importing any of them."""
    module = importlib.import_module(f"spicerack.{package}")
    return tuple(sorted(info.name for info in pkgutil.iter_modules(module.__path__) if not info.name.startswith("_")))


def get(package: str, name: str, constant: str) -> Any:
    """What plug-in `name` of `spicerack.<package>` declares as `constant`; KeyError if there is no such file."""
    if name not in names(package):
        raise KeyError(name)
    return vars(importlib.import_module(f"spicerack.{package}.{name}"))[constant]
