"""llama.cpp's own count beside the plan's, over families, contexts, users and caches."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from spicerack.machine import catalogue
from spicerack.planning import engine as engines
from spicerack.planning.engine import Request
from spicerack.planning.engines import _llama_fit
from spicerack.planning.exact import count
from spicerack.planning.model import open_model
from spicerack.planning.plan import Goal, plan

CONFIGS = Path(__file__).parent / "configs"
NAMES = (
    "Gemma-2-27b", "Gemma-3-27b", "Llama-2-7B", "Llama-3.1-70B", "Llama-3.1-8B", "Llama-3.2-1B",
    "Llama-4-Scout-17B-16E", "Mistral-7B-v0.1", "Mistral-Small-24B-2501", "Mixtral-8x7B", "Phi-4", "Qwen3-30B-A3B",
    "Qwen3-8B", "SmolLM2-135M", "TinyLlama-1.1B", "gpt-oss-120b", "gpt-oss-20b",
)  # fmt: skip
MIB = 1 << 20
REQUESTS = (Request(2048), Request(2048, users=4), Request(2048, cache_bits=8), Request(1280, users=3, cache_bits=4))
pytestmark = pytest.mark.interop


@pytest.mark.parametrize("name", NAMES)
def test_the_plan_is_llama_cpp_s_count(name: str) -> None:
    if shutil.which(_llama_fit.PROGRAM) is None:
        pytest.skip("llama.cpp is not installed; make interop builds it")
    model = open_model(CONFIGS / f"{name}.json")
    for scheme, request in zip(("Q4_K_M", "Q8_0", "Q2_K", "Q5_K_M"), REQUESTS, strict=True):
        if model.family == "phi3" and request.cache_bits < 16:
            continue  # llama.cpp 0c1e570 aborts with three users: more nodes than its graph has room for
        goal = Goal(catalogue.find("4x H100 SXM"), engines.get("llama.cpp"), request)
        exact = count.count(plan(model, goal, scheme=scheme), None, here=False)
        (host,) = exact.run.counted
        weights, cache, buffers = exact.planned
        # it rounds down to MiB; what is planned is the tensors, to the byte
        assert host.weights <= weights < host.weights + MIB + 4096
        assert host.cache <= cache < host.cache + MIB
        # of buffers never less than it takes: the formula is of a build that keeps up to five rows more
        rows = 5 * 4 * 512 * model.fields.hidden
        assert (
            host.buffers <= buffers + MIB and buffers - rows - MIB <= host.buffers + 2 * 4 * 512 * model.fields.hidden
        )
