"""The process on the other side of `turns.Worker`: python -m benchmarks.harness.worker FILE_DESCRIPTOR."""

from __future__ import annotations

import importlib
import logging
import sys
import traceback
import warnings
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.harness.peers.layer import Prepared


def serve(pipe: Connection[Any, Any]) -> None:
    """Answer messages until the pipe closes. Whatever fails is told, not raised."""
    kept: dict[str, Prepared] = {}
    while True:
        try:
            message = pipe.recv()
        except (EOFError, ConnectionResetError):
            return
        try:
            pipe.send((True, answer(kept, *message)))
        except ModuleNotFoundError as error:
            pipe.send((False, f"not installed: {error.name}"))
        except Exception as error:  # noqa: BLE001
            traceback.print_exc(limit=-3)
            pipe.send((False, f"{type(error).__name__}: {str(error)[:300]}"))


def answer(kept: dict[str, Prepared], order: str, key: str, target: str = "", *arguments: Any) -> Any:
    """Do what one message asks for."""
    if order == "turn":
        return kept[key].turn()
    kept.pop(key, None)
    if order == "drop":
        return None
    module, _, function = target.partition(":")
    kept[key] = getattr(importlib.import_module(module), function)(*arguments)
    return kept[key].facts


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    serve(Connection(int(sys.argv[1])))
