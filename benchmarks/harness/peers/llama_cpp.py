"""llama.cpp, through the C functions of llama-cpp-python: no sampling, nothing in Python but one call a token."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import llama_cpp as llama

from benchmarks.harness.peers.decoder import DECODE, PROMPT, Decoder, prompt, speeds, write_gguf
from benchmarks.harness.peers.layer import Prepared

TYPES = {
    "Q8_0": llama.LLAMA_FTYPE_MOSTLY_Q8_0,
    "Q4_0": llama.LLAMA_FTYPE_MOSTLY_Q4_0,
    "Q4_K_M": llama.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "TQ2_0": llama.LLAMA_FTYPE_MOSTLY_TQ2_0,
}


@llama.llama_log_callback
def _quiet(_level: int, _text: bytes, _data: ctypes.c_void_p) -> None:
    """llama.cpp's log goes nowhere."""


def decoder(variant: str, what: Decoder) -> Prepared:
    """variant: a key of TYPES. The GGUF files are made in `scratch` if they are not there yet."""
    llama.llama_log_set(_quiet, ctypes.c_void_p(0))
    llama.llama_backend_init()
    path = _file(variant, what)
    model = _must(llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params()), "load")
    parameters = llama.llama_context_default_params()
    parameters.n_ctx = PROMPT + DECODE
    parameters.n_batch = parameters.n_ubatch = PROMPT
    parameters.n_threads = parameters.n_threads_batch = what.threads
    context = _must(llama.llama_init_from_model(model, parameters), "make a context")
    ids = prompt()

    def turn(decode: int = DECODE) -> dict[str, float]:
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        begin = time.perf_counter()
        _feed(context, ids)
        middle = time.perf_counter()
        for token in ids[:decode]:
            _feed(context, [token])
        return speeds(begin, middle, decode)

    turn(2)
    read = sum(int(t.n_bytes) for t in gguf.GGUFReader(path).tensors if t.name != "token_embd.weight")
    return Prepared(turn, {"bytes": read, "system": llama.llama_print_system_info().decode().strip()})


def _feed(context: Any, ids: Sequence[int]) -> None:
    tokens = (llama.llama_token * len(ids))(*ids)
    if llama.llama_decode(context, llama.llama_batch_get_one(tokens, len(ids))):
        raise RuntimeError("llama_decode failed")
    llama.llama_synchronize(context)


def _file(variant: str, what: Decoder) -> Path:
    """The quantized file, made under another name first so that a broken one is never taken for whole."""
    path, whole = what.scratch / f"{variant}.gguf", what.scratch / "BF16.gguf"
    for target in (whole, path):
        if target.is_file():
            continue
        part = target.with_suffix(".part")
        if target == whole:
            write_gguf(what.folder, part)
        else:
            settings = llama.llama_model_quantize_default_params()
            settings.ftype, settings.nthread = TYPES[variant], what.threads
            if llama.llama_model_quantize(str(whole).encode(), str(part).encode(), ctypes.byref(settings)):
                raise RuntimeError(f"llama.cpp could not quantize to {variant}")
        part.rename(target)
    return path


def _must(pointer: Any, what: str) -> Any:
    if not pointer:
        raise RuntimeError(f"llama.cpp could not {what}")
    return pointer
