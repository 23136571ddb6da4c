"""A loaded model is a model: copied, pickled, cast and freed like any other, and nothing of loading outlives it."""

from __future__ import annotations

import copy
import gc
import io
import multiprocessing
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

import spicerack

SIZES = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "mixture": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=3)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=64, n_layer=1, n_head=4)),
}
IDS = torch.arange(3, 21).view(2, 9)


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("loaded")
    torch.manual_seed(0)
    MODELS[request.param]().eval().save_pretrained(where / "float")
    spicerack.quantize(where / "float", "w8", output=where / "out")
    return where / "out"


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=IDS).logits
    return result


def through_torch(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_torch, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles_give_the_same_bits(folder: Path, dtype: torch.dtype | None, duplicate: Any) -> None:
    model = spicerack.load(folder, dtype=dtype)
    expected = logits(model)
    again = duplicate(model)
    assert type(again) is type(model) and torch.equal(logits(again), expected)
    with pytest.raises(ValueError, match="not serializable"):
        again.save_pretrained(folder / "never")
    spicerack.load(folder, dtype=dtype).load_state_dict(again.state_dict())


def test_nothing_of_loading_outlives_it(folder: Path) -> None:
    gc.collect()
    before = {id(t) for t in gc.get_objects() if issubclass(type(t), torch.Tensor)}
    model = spicerack.load(folder, dtype=torch.bfloat16)
    logits(model)
    gc.collect()
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    tensors = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and id(t) not in before]
    others = [t for t in tensors if t.numel() > 64 and t.untyped_storage().data_ptr() not in own]
    assert not others, [(t.shape, t.dtype) for t in others]
    assert str(folder) not in Path("/proc/self/maps").read_text(), "all floats were cast: no file is needed"
    gone, _ = weakref.ref(model), gc.disable()
    try:
        del model, tensors
        assert gone() is None, "it is in no cycle"
    finally:
        gc.enable()


@pytest.mark.parametrize("cast", ["half", "bfloat16", "float"])
def test_casts_change_floats_and_leave_what_is_packed(folder: Path, cast: str) -> None:
    for model in (spicerack.load(folder), spicerack.load(folder, dtype=torch.bfloat16)):
        expected, packed = logits(model), {n: t.clone() for n, t in model.state_dict().items() if ".packed." in n}
        assert getattr(model, cast)() is model
        dtype = {"half": torch.float16, "bfloat16": torch.bfloat16, "float": torch.float32}[cast]
        assert {p.dtype for p in model.parameters()} == {dtype} == {logits(model).dtype} and model.dtype == dtype
        torch.testing.assert_close(logits(model).float(), expected.float(), atol=0.05, rtol=0.05)
        assert all(torch.equal(t, packed[n]) for n, t in model.state_dict().items() if n in packed)


def _put(folder: Path, model: nn.Module, results: Any) -> None:
    """In a process of its own, which gets the model by a pickle."""
    results.put(torch.equal(logits(model), logits(spicerack.load(folder))))


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["mixture"], indirect=True)
def test_it_goes_to_spawned_processes(folder: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_put, args=(folder, spicerack.load(folder), results))
    process.start()
    assert results.get(timeout=120)
    process.join()
