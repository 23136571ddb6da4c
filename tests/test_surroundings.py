"""The same bits whatever surrounds the call: types and devices by default, modes, threads, forks, seeds of hashing.

What is computed is the core of the package, from numbers to trained folders, with inputs whose types are said; what
comes out is told by hashes, which have to be those of a process that nobody set anything in.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, byte_tokenizer
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import spicerack
from spicerack import plugins
from spicerack.algorithms.solvers import blockap, signround
from spicerack.numerics import codec, rounding
from spicerack.numerics.scheme import parse
from spicerack.text.calibration import Calibration

SCHEMES = ["w8", "w4g32", "w4g32z", "w2g32h", "w8t", "w8a8", "w6", *plugins.names("numerics.schemes")]
TRAINED = ["w4g32", "w2g32h", "w4g32z", "ternarya8"]
METHODS = ["rtn", "hqq", "gptq", "awq+gptq", "smoothquant", "signround", "blockap"]
TYPES = [torch.float32, torch.bfloat16, torch.float16]
TIMES = "run.json"  # how long it took, and how much memory
Hashes = dict[str, str]


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype)


def told(*results: torch.Tensor) -> str:
    digest = hashlib.sha256()
    for x in results:
        x = x.detach().contiguous().cpu()
        digest.update(f"{x.dtype}{[*x.shape]}".encode() + x.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def bytes_of(folder: Path) -> Hashes:
    return {f"{path.relative_to(folder)}": hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.iterdir()) if path.name != TIMES}  # fmt: skip


def linear(dtype: torch.dtype = torch.float32) -> nn.Linear:
    layer = nn.Linear(256, 96, dtype=dtype, device="cpu")
    layer.weight.data.copy_(numbers(96, 256, seed=1) * 0.1)
    layer.bias.data.copy_(numbers(96, seed=2))
    return layer


# ---- the core --------------------------------------------------------------------------------------------------------


def layers(_folder: Path) -> Hashes:
    """Codes, decoded weights, products and their gradients of every scheme; embeddings and convolutions."""
    found = {}
    for name in SCHEMES:
        for dtype in TYPES:
            q = rounding.to_nearest(linear(dtype).weight.detach(), parse(name))
            layer = spicerack.quantize(linear(dtype), name)
            x = numbers(5, 256, seed=3, dtype=dtype)
            found[f"{name} {dtype}"] = told(codec.decode(q), layer.weight, layer(x), layer(x[:1]))
            if torch.is_grad_enabled():
                y = layer(x.requires_grad_())
                found[f"{name} {dtype} gradient"] = told(torch.autograd.grad(y.float().sum(), x)[0])
            if dtype == torch.float32 and parse(name).activations is None:
                table = nn.Embedding(64, 256, dtype=dtype, device="cpu")
                table.weight.data.copy_(numbers(64, 256, seed=4))
                small = spicerack.quantize(nn.Sequential(table), name, rules=[f"0={name}"])
                found[f"{name} table"] = told(small(torch.tensor([[3, 1], [3, 63]], dtype=torch.int64, device="cpu")))
    convolution = nn.Conv2d(8, 16, 3, dtype=torch.float32, device="cpu")
    convolution.weight.data.copy_(numbers(16, 8, 3, 3))
    convolution.bias.data.zero_()
    found["conv2d"] = told(spicerack.quantize(convolution, "w4g8")(numbers(2, 8, 9, 9)))
    return found


def training(_folder: Path) -> Hashes:
    """Fake layers, their gradients, and what is frozen after two steps."""
    found = {}
    for name in TRAINED:
        qat = spicerack.prepare_qat(nn.Sequential(linear(), nn.GELU()), name)
        optimizer = torch.optim.SGD(qat.parameters(), 0.1)
        for step in range(2):
            optimizer.zero_grad()
            qat(numbers(7, 256, seed=step)).square().mean().backward()
            optimizer.step()
        small = spicerack.freeze(qat)
        found[name] = told(*qat.state_dict().values(), small[0].weight, small(numbers(3, 256)))
    return found


def language_model(folder: Path) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=257, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=256, eos_token_id=256, dtype="float32",
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.float32)
    for i, parameter in enumerate(model.parameters()):
        parameter.data.copy_(numbers(*parameter.shape, seed=i) * 0.1 if parameter.dim() > 1 else parameter.data * 0 + 1)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model


def text_of(count: int = 12) -> Calibration:
    generator = torch.Generator("cpu").manual_seed(0)
    ids = torch.randint(3, 250, (count, 24), generator=generator, dtype=torch.int64, device="cpu")
    return Calibration(ids, None, "of no text", 0.0, "made up")


def folders(folder: Path, methods: Sequence[str] = METHODS) -> Hashes:
    """Bytes of quantized folders by every method, and what a loaded one computes, generates and loses."""
    language_model(folder / "model")
    found: Hashes = {}
    for method in methods:
        out = folder / method
        rules = ["model.embed_tokens=w8"] if method == "gptq" else []
        spicerack.quantize(folder / "model", "w4g32", output=out, method=method, calibration=text_of(), rules=rules)
        found |= {f"{method} {name}": digest for name, digest in bytes_of(out).items()}
    model = spicerack.load(folder / "gptq")
    ids = text_of(2).ids
    with torch.no_grad():
        found["logits"] = told(model(ids).logits, model.model.embed_tokens(ids))
        found["generated"] = told(model.generate(ids, max_new_tokens=5, do_sample=False))
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog, again and again. " * 20)
    measured = spicerack.evaluate(folder / "gptq", against=folder / "model", text=text, window=32, max_tokens=200)
    found["eval"] = json.dumps(measured, sort_keys=True)
    return found


def encoders(folder: Path) -> Hashes:
    config = BertConfig(vocab_size=257, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                        num_attention_heads=4, max_position_embeddings=64, dtype="float32")  # fmt: skip
    model = BertModel(config).to(torch.float32).eval()
    for i, parameter in enumerate(model.parameters()):
        parameter.data.copy_(numbers(*parameter.shape, seed=i) * 0.1)
    model.save_pretrained(folder / "bert")
    spicerack.quantize(folder / "bert", "w8", output=folder / "bert8")
    small, ids = spicerack.load(folder / "bert8"), text_of(3).ids
    with torch.no_grad():
        return {"encoder": told(small(ids).last_hidden_state), **bytes_of(folder / "bert8")}


def learned(folder: Path) -> Hashes:
    """The same of methods that need gradients."""
    return folders(folder, ("gptq", "signround", "blockap"))


PARTS: Mapping[str, Callable[[Path], Hashes]] = {
    "layers": layers, "training": training, "folders": folders, "learned": learned, "encoders": encoders
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Hashes]:
    """What a part gives in surroundings that nobody changed; computed once."""
    known: dict[str, Hashes] = {}

    def of(part: str) -> Hashes:
        if part not in known:
            known[part] = PARTS[part](tmp_path_factory.mktemp(part))
        return known[part]

    return of


@pytest.fixture(autouse=True)
def quick_learners(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signround, "STEPS", 3)
    monkeypatch.setattr(blockap, "STEPS", 3)


# ---- the surroundings ------------------------------------------------------------------------------------------------


@contextmanager
def by_default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def with_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def surroundings() -> Iterator[Any]:
    every: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "bfloat16": lambda: by_default(torch.bfloat16),
        "float64": lambda: by_default(torch.float64),
        "meta": lambda: torch.device("meta"),
        "inference": torch.inference_mode,
        "no_grad": torch.no_grad,
        "threads": lambda: with_threads(3),
    }
    left_out = {
        ("meta", "folders"), ("meta", "encoders"),  # transformers itself would build its models there
        ("inference", "training"), ("no_grad", "training"),  # there is nothing to learn from
        ("no_grad", "folders"),  # as in inference, but where there is something to learn
    }  # fmt: skip
    for name, enter in every.items():
        for part in PARTS:
            if (name, part) not in left_out and (part != "learned" or name == "no_grad"):
                slow = [pytest.mark.slow] if (name, part) == ("threads", "folders") or part == "learned" else []
                yield pytest.param(enter, part, id=f"{name}-{part}", marks=slow)


@pytest.mark.parametrize(("enter", "part"), [*surroundings()])
def test_same_bits(
    enter: Callable[[], AbstractContextManager[Any]], part: str, plain: Callable[[str], Hashes], tmp_path: Path
) -> None:
    expected = plain(part)
    with enter():
        given = PARTS[part](tmp_path)
    assert_same(given, expected)


def assert_same(given: Hashes, expected: Hashes) -> None:
    assert given.keys() == {name for name in expected if "gradient" not in name or name in given}
    assert not [name for name in given if given[name] != expected[name]]


def test_same_bits_in_four_threads_at_once(plain: Callable[[str], Hashes], tmp_path: Path) -> None:
    expected = plain("layers")
    with ThreadPoolExecutor(4) as pool:
        for given in pool.map(lambda _: layers(tmp_path), range(4)):
            assert_same(given, expected)


def test_same_bits_in_a_fork(plain: Callable[[str], Hashes], tmp_path: Path) -> None:
    expected = plain("layers")
    context = multiprocessing.get_context("fork")
    with context.Pool(1) as pool:
        assert_same(pool.apply_async(layers, (tmp_path,)).get(timeout=120), expected)


HASHED = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[2]]
import spicerack, test_surroundings as t, tiny
folder = Path(sys.argv[1])
tiny.build("hrm_text").save_pretrained(folder / "float")
spicerack.quantize(folder / "float", "w8", output=folder / "w8")
said = t.folders(folder, ["gptq"]) | t.encoders(folder) | t.bytes_of(folder / "w8")
print(sorted(said.items()))
"""


@pytest.mark.slow
def test_same_bits_whatever_the_seed_of_hashing(tmp_path: Path) -> None:
    said = []
    for seed in ("1", "2"):
        (tmp_path / seed).mkdir()
        done = subprocess.run(
            [sys.executable, "-c", HASHED, str(tmp_path / seed), str(ROOT / "tests")],
            env=os.environ | {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        said.append(done.stdout)
    assert said[0] == said[1]
