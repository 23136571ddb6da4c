"""Model folders for the tests: small random ones of real architectures, and the real ones where they are at hand."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from spicerack.algorithms.solved import Solved
from spicerack.algorithms.solvers import gptq
from spicerack.kernels import kernel, panels
from spicerack.numerics.scheme import parse

ROOT = Path(__file__).parents[1]
STORIES = ROOT.parent / "shared" / "models" / "stories260k"
STDLIB_LM = ROOT / "assets" / "stdlib-lm"
LlamaFolder = Callable[..., Path]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("spicerack")
    group.addoption("--engine", choices=panels.NAMES, help="compute as on a processor whose fastest engine this is")
    # Tests run beside each other, and threads of one that wait for each other would crawl.
    group.addoption("--threads", type=int, default=1, help="of torch and of the kernels, in each test")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(config.getoption("threads"))
    engine, index = config.getoption("engine"), panels.engine_index
    if engine is not None:
        panels.engine_index = lambda name=None: index(engine if name is None else name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow ones first, and before them what compiles and emulates: the others fill what is left, and no worker waits at
    the end for the last of them."""
    native = ROOT / "tests" / "native"
    items.sort(key=lambda item: (native not in item.path.parents, item.get_closest_marker("slow") is None))


def pytest_runtest_setup() -> None:
    """What a test draws from torch's own generator does not depend on which ran before it in the same process."""
    torch.manual_seed(0)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with no merges: 256 bytes and an end-of-text token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*alphabet, "<|end|>"])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|end|>")


def starting_tokenizer() -> PreTrainedTokenizerBase:
    """As Llama's: every text begins with <s>, and </s> ends one."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    start = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", start)]
    )
    assert tokenizer("a").input_ids[0] == start
    return tokenizer


@pytest.fixture
def llama_folder(tmp_path: Path) -> LlamaFolder:
    """Makes a random Llama folder; keyword arguments override its config."""

    def make(
        name: str = "model",
        *,
        dtype: torch.dtype = torch.float32,
        max_shard_size: str = "5GB",
        seed: int = 0,
        **overrides: Any,
    ) -> Path:
        settings: dict[str, Any] = {
            "vocab_size": 257,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "tie_word_embeddings": False,
            "bos_token_id": 256,
            "eos_token_id": 256,
        }
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**settings | overrides)).to(dtype)
        folder = tmp_path / name
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        byte_tokenizer().save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def stories() -> Path:
    """The 260 k parameter Llama trained by others, with awkward widths; skips where it is not at hand."""
    if not STORIES.is_dir():
        pytest.skip("../shared/models/stories260k is not there")
    return STORIES


@pytest.fixture
def stdlib_lm() -> Path:
    """The project's own language model."""
    return STDLIB_LM


@pytest.fixture
def reference_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers compute with decoded weights in torch, to the bit, where a test is about something other than kernels."""
    reference = [kernel.get("reference")]
    monkeypatch.setattr(kernel, "table", lambda: reference)


@pytest.fixture
def grams(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]]:
    """Gram, pull and weight that GPTQ was given, in order; it changes nothing: all layers are rounded to nearest."""
    given: list[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]] = []

    def keep(w: torch.Tensor, start: Any, gram: torch.Tensor, pull: torch.Tensor | None = None) -> Any:
        given.append((gram.double(), None if pull is None else pull.double(), w.double()))
        return Solved(start)

    monkeypatch.setattr(gptq, "SOLVER", dataclasses.replace(gptq.SOLVER, solve=keep))
    return given


def kernel_here(scheme: str) -> str:
    """Name of the kernel that runs a scheme by default on this machine."""
    return kernel.pick(parse(scheme), (64, 64), torch.float32, torch.device("cpu")).kernel.name


def pytest_collection_finish() -> None:
    """What stands now stays to the end: the collector need not look through ten thousand tests, torch and transformers
    again and again."""
    gc.collect()
    gc.freeze()
