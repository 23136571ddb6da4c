"""A config.json from whoever: any field may be anything, and the answer is a plan or a refusal, at once."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
from test_model import FACTS, config

from spicerack.errors import UsageError
from spicerack.machine import catalogue
from spicerack.planning import engine as engines
from spicerack.planning.engine import Request
from spicerack.planning.model import of_config
from spicerack.planning.plan import Goal, check, row_of

STRANGE: tuple[Any, ...] = (None, 0, -1, "x", [], {}, 10**12, True, 1.5, [None], ["\x1b[2J"])


NAMES = (  # of each way of attending, of states, experts, towers and encoders one
    "DeepSeek-V3", "Gemma-3-27b", "Granite-4.0-H-Small", "Llama-4-Scout-17B-16E", "Mixtral-8x7B",
    "Qwen3-Next-80B-A3B", "Whisper-large-v3", "gpt-oss-20b", "mamba-2.8b",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_any_field_may_be_anything(name: str) -> None:
    own = {key: value for key, value in config(name).items() if key != FACTS}
    goal = Goal(catalogue.find("2x3090"), engines.get("llama.cpp"), Request(4096))
    sections = [own, *(value for value in own.values() if isinstance(value, dict))]
    places = [(section, key) for section in sections for key in section]
    for section, key in random.Random(name).sample(places, min(12, len(places))):
        kept = section[key]
        for value in STRANGE:
            section[key] = value
            begin = time.process_time()
            try:
                model = of_config(own)
                check(model, goal)
                row_of(model, goal.engine.precisions(model)[-1], goal)
            except UsageError as refused:
                assert refused.message.isprintable()
            assert time.process_time() - begin < 5, f"{key} = {value!r}"
        section[key] = kept
