"""Engines as data: every rule has its source, and what follows from rules is what the engines' own code says."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

from spicerack import plugins
from spicerack.errors import UsageError
from spicerack.numerics.scheme import parse
from spicerack.planning import engine as planned
from spicerack.storage import engine as engines
from spicerack.storage import exactness
from spicerack.storage.format import StoredTensor

ENGINES = [engine.name for engine in engines.every()]


def stored(scheme: str, shape: tuple[int, int] = (256, 256), role: str = "linear", name: str = "a.0.b") -> StoredTensor:
    return StoredTensor(name, parse(scheme), shape, role=role)


@pytest.mark.parametrize("name", ENGINES)
def test_every_rule_says_where_it_is_written(name: str) -> None:
    engine = engines.find(name)
    assert re.search(r"\d\.\d", engine.version)
    sources = [limit.source for way in engine.reads for limit in way.limits] + [tie.source for tie in engine.ties]
    assert all(len(source) > 20 for source in sources)
    assert all(way.checked for way in engine.reads)
    for way in engine.reads:
        assert not way.written or way.format in plugins.names("storage.formats")
    for scheme in (*engine.usual, *(name for pair in engine.fallbacks for name in pair)):
        parse(scheme)


def test_names_around_an_engine() -> None:
    assert engines.find("Ollama").name == engines.find("LM Studio").name == engines.find("llamacpp").name == "llama.cpp"
    with pytest.raises(UsageError, match=r"no engine is known as 'vlm'.*one of executorch, llama\.cpp"):
        engines.find("vlm")


def test_rules_are_read_without_torch() -> None:
    code = "import sys; from spicerack.storage import engine; engine.every(); print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert said.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("name", "to", "given", "reason"),
    [
        ("llama.cpp", "gguf", stored("q4_k", (64, 320)), "rows of 320 are no whole blocks of 256"),
        ("llama.cpp", "gguf", stored("w4g32", role="router"), "computes no quantized router"),
        ("llama.cpp", "gguf", stored("w4g32", role="embedding", name="transformer.wpe"), "no quantized embedding"),
        ("vllm", "compressed-tensors", stored("w4g16"), "groups of 16"),
        ("vllm", "compressed-tensors", stored("w8g32z"), "zero points in 8 bits"),
        ("vllm", "compressed-tensors", stored("w4g32", (96, 256)), "only multiples of 64 rows and 128 columns"),
        ("vllm", "compressed-tensors", stored("w4g32", role="head"), "no quantized head"),
        ("vllm", "gptq", stored("w4g32z"), "zero points in 4 bits"),
        ("mlx", "mlx", stored("w4g16"), "no groups of 16"),
        ("onnxruntime", "onnx", stored("q6_k"), "no scales like those of q6_k"),
        ("executorch", "pte", stored("w4g32"), "float16 scales of groups"),
    ],
)
def test_refusals(name: str, to: str, given: StoredTensor, reason: str) -> None:
    engine = engines.find(name)
    way = engine.reading(to, "llama")
    [obstacle] = exactness.obstacles(engine, way, {given.module: given})
    assert reason in obstacle.rule
    assert obstacle.rule.startswith(f"{given.module}: ")
    assert obstacle.source


def test_what_is_computed() -> None:
    for name, to, given in [
        ("llama.cpp", "gguf", stored("q4_k")),
        ("llama.cpp", "gguf", stored("w4g128", role="head")),
        ("vllm", "compressed-tensors", stored("w4g32z")),
        ("vllm", "compressed-tensors", stored("w8a8", (96, 96))),
        ("vllm", "gptq", stored("w8", role="head")),
        ("onnxruntime", "onnx", stored("w2g32z", role="embedding")),
        ("executorch", "pte", StoredTensor("a", parse("w4g32"), (64, 64), source_dtype=torch.bfloat16)),
    ]:
        engine = engines.find(name)
        assert exactness.obstacles(engine, engine.reading(to, "llama"), {given.module: given}) == [], name


@pytest.mark.parametrize(
    ("name", "to", "given", "theirs"),
    [
        ("llama.cpp", "gguf", "w8a8s", "w8"),
        ("vllm", "compressed-tensors", "w3g64", "w4g64"),
        ("transformers", "gguf", "w2g64", "w3g64"),
        ("onnxruntime", "onnx", "ternary", "w2g256"),
        ("mlx", "mlx", "w4", "w4g128"),
    ],
)
def test_the_same_numbers_in_another_scheme(name: str, to: str, given: str, theirs: str) -> None:
    engine = engines.find(name)
    one = stored(given)
    held = exactness.held(engine, engine.reading(to, "llama"), {one.module: one})[one.module]
    assert (held.stored.scheme.name, held.exact) == (theirs, True)


@pytest.mark.parametrize(
    ("given", "columns", "wanted"),
    [
        ("q4_k", 320, "w5g32"),
        ("q5_k", 320, "q5_1"),
        ("q6_k", 320, "w8g32"),
        ("q3_k", 320, "w4g32"),
        ("q4_k", 172, None),
    ],
)
def test_llama_cpp_s_own_fallbacks(given: str, columns: int, wanted: str | None) -> None:
    engine = engines.find("llama.cpp")
    near = exactness.nearest(engine, engine.reads[0], stored(given, (64, columns)))
    assert (near and near.name) == wanted


def test_ties() -> None:
    engine = engines.find("vllm")
    names = ["l.0.q_proj", "l.0.k_proj", "l.0.v_proj"]
    contents = {name: stored("w8" if "q_" in name else "w4", name=name) for name in names}
    assert [one.module for one in exactness.obstacles(engine, engine.reads[0], contents, [names])] == names[1:]
    some = {name: contents[name] for name in names[1:]}
    [float_one] = exactness.obstacles(engine, engine.reads[0], some, [names])
    assert (float_one.module, float_one.nearest) == (names[0], parse("w4"))
    assert "float and w4" in float_one.rule
    experts = {f"l.0.experts.{e}.{p}": stored("w4" if e else "w8", name=f"l.0.experts.{e}.{p}") for e in range(2)
               for p in ("up", "down")}  # fmt: skip
    assert len(exactness.obstacles(engine, engine.reads[0], experts)) == 2
    mixed = {name: stored("w4" if "up" in name else "w8", name=name) for name in experts}
    assert exactness.obstacles(engines.find("llama.cpp"), engines.find("llama.cpp").reads[0], mixed) == []
    assert len(exactness.obstacles(engine, engine.reads[0], mixed)) == 2


WORDS = (
    "llama.cpp",
    "LlamaCpp",
    "llama-cpp",
    "Ollama",
    "LM Studio",
    "vLLM",
    "mlx",
    "mlx-lm",
    "hf",
    "transformers",
    "ort",
)


@pytest.mark.parametrize("word", WORDS)
def test_plans_and_recipes_take_the_same_words(word: str) -> None:
    assert engines.plain(engines.find(word).name) == engines.plain(planned.get(word).name)


def test_what_only_one_of_them_has_is_said() -> None:
    with pytest.raises(UsageError, match="computes every scheme"):
        engines.find("spicerack")
    with pytest.raises(UsageError, match="nothing is planned for ExecuTorch yet"):
        planned.get("ExecuTorch")
    assert {engines.plain(name) for name in planned.names()} - {engines.plain(name) for name in engines.names()} == {
        "spicerack"
    }
