"""Damaged and hostile GGUF files: an error of ours or a model, never another error, a hang or a wrong folder."""

from __future__ import annotations

import collections
import os
import random
import struct
import time
from pathlib import Path

import pytest
import torch
from ggufs import folder, written

import spicerack
from spicerack.errors import SpicerackError
from spicerack.models.overview import look
from spicerack.storage.gguf.header import read_header
from spicerack.text.tokenizer import read_tokenizer

FAMILIES = ("llama", "gemma2", "bert", "gpt2", "qwen3_moe", "falcon", "stablelm")
MANY = int(os.environ.get("SPICERACK_MUTATIONS", "200"))
"""Files of the slow test, by default; about 9,000 were read by scripts since this was written."""
NUMBERS = (0, 1, 3, 7, 2**31 - 1, 2**32 - 1, 0x7FC00000, 0x7F800000)
LENGTHS = (0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)
SECONDS = 20
"""That a file of 300 KB may take, on a machine that does other things, too."""


def mutated(data: bytes, begin: int, draw: random.Random) -> bytes:
    """The file with something changed. begin: of its first tensor."""
    raw, at = bytearray(data), draw.randrange(begin - 8)
    kind = draw.choice(("bytes", "bytes", "length", "value", "value", "cut", "tensors", "copy"))
    if kind == "bytes":
        for _ in range(draw.choice((1, 1, 2, 8))):
            raw[draw.randrange(begin)] = draw.randrange(256)
    elif kind == "length":
        raw[at : at + 8] = struct.pack("<Q", draw.choice(LENGTHS))
    elif kind == "value":  # most keys with numbers come first
        at = draw.randrange(min(begin, 3000) - 4)
        raw[at : at + 4] = struct.pack("<I", draw.choice(NUMBERS))
    elif kind == "cut":
        return bytes(raw[: draw.randrange(len(raw))])
    elif kind == "tensors":
        for _ in range(20):
            raw[draw.randrange(begin, len(raw))] = draw.randrange(256)
    else:
        size = draw.randrange(1, 64)
        piece = raw[at : at + size]
        other = draw.randrange(begin - len(piece))
        raw[other : other + len(piece)] = piece
    return bytes(raw)


def outcome(file: Path, output: Path) -> str:
    """What becomes of a file: "runs", or the name of an error of ours. Raises whatever else is raised."""
    try:
        look(file)
        spicerack.import_model(file, output=output)
        model = spicerack.load(file)
        with torch.no_grad():
            model(torch.arange(8)[None])
        read_tokenizer(file, model.config)("hello world")
    except SpicerackError as error:
        return type(error).__name__
    return "runs"


def read_all(count: int, seed: int, place: Path, families: tuple[str, ...]) -> collections.Counter[str]:
    """What becomes of so many files, and how often."""
    draw, outcomes = random.Random(seed), collections.Counter[str]()
    sources = []
    for family in families:
        spicerack.quantize(folder(family), "w4g32", output=place / family, fit_groups=True)
        file = written(place / family, place / f"{family}.gguf")
        sources.append((file.read_bytes(), min(tensor.begin for tensor in read_header(file).tensors)))
    before = {path.name for path in place.iterdir()}
    for number in range(count):
        file, output = place / "mutated.gguf", place / "output"
        file.write_bytes(mutated(*sources[number % len(sources)], draw))
        begin = time.monotonic()
        result = outcome(file, output)
        assert time.monotonic() - begin < SECONDS, f"file {number} of seed {seed}"
        if output.exists():
            spicerack.load(output)  # what was imported is whole
            for path in output.iterdir():
                path.unlink()
            output.rmdir()
        assert {path.name for path in place.iterdir()} == before | {"mutated.gguf"}, f"file {number} of seed {seed}"
        outcomes[result] += 1
    return outcomes


def test_mutated_files_are_refused_or_read(tmp_path: Path) -> None:
    outcomes = read_all(12, 0, tmp_path, FAMILIES[-1:])
    assert outcomes["CheckpointError"] > 3 and sum(outcomes.values()) == 12


def test_no_heads_for_keys_is_named(tmp_path: Path) -> None:
    raw = bytearray(written(folder("llama"), tmp_path / "model.gguf").read_bytes())
    key = b"llama.attention.head_count_kv"
    at = raw.index(key) + len(key) + 4
    raw[at : at + 4] = bytes(4)
    (tmp_path / "none.gguf").write_bytes(raw)
    with pytest.raises(SpicerackError):
        spicerack.load(tmp_path / "none.gguf")


@pytest.mark.slow
def test_many_mutated_files_are_refused_or_read(tmp_path: Path) -> None:
    outcomes = read_all(MANY, 1, tmp_path, FAMILIES)
    assert outcomes["CheckpointError"] > MANY // 3 and outcomes["runs"] > 0
