"""Encoders as one native call: modules' results, the same bits in every batch, and modules wherever they are asked."""

from __future__ import annotations

import copy
import gc
import inspect
import math
import os
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from types import MethodType
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

import spicerack
from spicerack import _native
from spicerack.kernels import panels, plan, pool
from spicerack.kernels.panels import TYPES
from spicerack.models import bundled
from spicerack.nn.encoder import whole as encoder
from spicerack.nn.linear import QLinear

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99,
    "max_position_embeddings": 40,
}  # fmt: skip
MODERN = {
    **SIZES, "num_hidden_layers": 3, "local_attention": 6, "pad_token_id": 1, "cls_token_id": 2, "sep_token_id": 3,
    "bos_token_id": 2, "eos_token_id": 3,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", SIZES),
    "roberta": ("Roberta", {**SIZES, "type_vocab_size": 1}),
    "xlm-roberta": ("XLMRoberta", {**SIZES, "type_vocab_size": 2}),
    "camembert": ("Camembert", {**SIZES, "type_vocab_size": 1}),
    "electra": ("Electra", {**SIZES, "embedding_size": 32}),
    "electra without a projection": ("Electra", {**SIZES, "embedding_size": 64}),
    "distilbert": (
        "DistilBert",
        {"dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4, "vocab_size": 99, "max_position_embeddings": 40},
    ),
    "mpnet": ("MPNet", SIZES),
    "nomic": ("NomicBert", SIZES),
    "nomic with wide heads": ("NomicBert", {**SIZES, "num_attention_heads": 2, "head_dim": 48}),
    "modernbert": ("ModernBert", MODERN),
    "modernbert with biases": (
        "ModernBert",
        {**MODERN, "attention_bias": True, "mlp_bias": True, "norm_bias": True, "hidden_activation": "silu"},
    ),
}


def made(family: str, **settings: Any) -> PreTrainedModel:
    """A random float model, whose norms and biases are random, too; weights are large enough that attention matters."""
    name, sizes = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")
    model: PreTrainedModel = getattr(transformers, f"{name}Model")(config(**{**sizes, **settings})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
            elif parameter.dim() == 2 and parameter.std() < 0.05:
                parameter *= 5
    return model


def quantized(family: str = "bert", scheme: str = "w8", compute: Any = "float", **settings: Any) -> Any:
    return spicerack.quantize(made(family, **settings), scheme, compute=compute)


def quantized_folder(path: Path, family: str, scheme: str = "w8") -> Path:
    made(family).save_pretrained(path / "original")
    spicerack.quantize(path / "original", scheme, output=path / "out")
    return path / "out"


def modules(model: Any, *args: Any, **asked: Any) -> Any:
    """What the model's own code makes of it."""
    return type(model).forward(model, *args, **asked)


def sentences(lengths: list[int], seed: int = 0) -> dict[str, torch.Tensor]:
    """Ids from 2 on, with 1 behind them, and the mask."""
    ids = torch.randint(2, 99, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask + (1 - mask), "attention_mask": mask}


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Results of plans."""
    results: list[torch.Tensor] = []
    run = plan.Plan.run

    def counted(*args: Any) -> torch.Tensor:
        results.append(run(*args))
        return results[-1]

    monkeypatch.setattr(plan.Plan, "run", counted)
    return results


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def assert_close(ours: Any, theirs: Any, seen: torch.Tensor, bound: float) -> None:
    assert type(ours) is type(theirs) and ours.keys() == theirs.keys()
    a, b = ours.last_hidden_state, theirs.last_hidden_state
    assert (a[seen] - b[seen]).abs().max() <= bound * b[seen].abs().max()
    assert not a[~seen].any()
    if "pooler_output" in theirs:
        assert (ours.pooler_output - theirs.pooler_output).abs().max() <= bound


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("scheme", "compute", "bound"),
    [("w8", "float", 2e-6), ("w8", "int8", 0.05), ("w8a8", None, 0.1), ("w4g32z", "float", 2e-6),
     ("ternary", "int8", 0.05)],
)  # fmt: skip
@torch.no_grad()
def test_gives_what_the_modules_give(
    family: str, scheme: str, compute: Any, bound: float, runs: list[torch.Tensor]
) -> None:
    model = quantized(family, scheme, compute)
    assert encoder.obstacles(model) == {"": None}
    runs.clear()
    batch = sentences([9, 1, 17, 5])
    seen = batch["attention_mask"].bool()
    assert_close(model(**batch), modules(model, **batch), seen, bound)
    everything = torch.ones_like(seen)
    ids = batch["input_ids"]
    assert_close(model(ids), modules(model, ids), everything, bound)
    assert_close(model(ids.int()), modules(model, ids), everything, bound)
    positions = torch.arange(17).flip(0)[None] + 3
    given = {"input_ids": ids.t().contiguous().t(), "position_ids": positions, "attention_mask": seen}
    assert_close(model(**given, return_dict=True), modules(model, **given), seen, bound)
    if family in ("bert", "xlm-roberta") or "electra" in family or "nomic" in family:
        types = (torch.arange(17) > 4).long().expand(4, 17)
        assert_close(model(ids, None, types), modules(model, ids, None, types), everything, bound)
        assert len(runs) == 5
    assert len(runs) >= 4


@pytest.mark.parametrize(
    ("family", "rules"),
    [("bert", []), ("bert", ["**.word_embeddings=w8"]), ("mpnet", []), ("mpnet", ["**.relative_attention_bias=w8"]),
     ("nomic", []), ("modernbert", []), ("modernbert", ["**.tok_embeddings=w4g32"])],
)  # fmt: skip
@torch.no_grad()
def test_is_right_in_float64(family: str, rules: list[str]) -> None:
    """Against the float model whose weights are those of the codes, in float64 by torch's own attention."""
    original = made(family)
    model: Any = spicerack.quantize(copy.deepcopy(original), "w8", compute="float", rules=rules)
    assert encoder.obstacles(model) == {"": None}
    exact = original.double()
    exact.set_attn_implementation("eager")
    for path, layer in model.named_modules():
        if hasattr(layer, "packed"):
            exact.get_submodule(path).weight.copy_(layer.packed.decode())
    batch = sentences([12, 4])
    for ours, row, length in zip(model(**batch).last_hidden_state, batch["input_ids"], [12, 4], strict=True):
        # Without padding, of which the eager ModernBERT makes NaN where a window holds nothing else.
        expected = modules(exact, row[None, :length]).last_hidden_state[0]
        # Angles of rotary positions are float32 in either.
        assert (ours[:length] - expected).abs().max() < 2e-6 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["bert", "mpnet", "nomic", "modernbert"])
@torch.no_grad()
def test_a_narrow_model_is_computed_in_float32_and_rounded_once(
    family: str, dtype: torch.dtype, runs: list[torch.Tensor]
) -> None:
    """Against the same model, codes and all, in float32: nearer to it than its own modules in their type."""
    narrow: Any = spicerack.quantize(made(family).to(dtype), "w8", compute="float")
    wide = copy.deepcopy(narrow).float()
    batch = sentences([30, 12])
    runs.clear()
    ours, exact = narrow(**batch).last_hidden_state, wide(**batch).last_hidden_state
    assert encoder.obstacles(narrow) == encoder.obstacles(wide) == {"": None}
    assert [run.dtype for run in runs][:: len(runs) - 1] == [dtype, torch.float32]
    seen = batch["attention_mask"].bool()
    unit = {torch.float32: 2e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
    difference = (ours.float() - exact)[seen].abs()
    assert (difference <= unit * exact[seen].abs() + 3e-6).all() and ours.dtype == dtype
    theirs = modules(narrow, **batch).last_hidden_state
    assert theirs.dtype == dtype
    if dtype != torch.float32:
        assert difference.mean() < 0.6 * (theirs.float() - exact)[seen].abs().mean()


@pytest.mark.parametrize("family", ["mpnet", "nomic", "modernbert"])
@torch.no_grad()
def test_distances_and_rotary_positions_hold_in_every_batch(
    family: str, threads: None, runs: list[torch.Tensor]
) -> None:
    model = quantized(family, compute="int8", max_position_embeddings=402)
    lengths = [3, 40, 1, 390, 17, 17, 2, 100]
    batch = sentences(lengths)
    alone = [
        model(row[None, :length]).last_hidden_state[0] for row, length in zip(batch["input_ids"], lengths, strict=True)
    ]
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        for order in ([*range(8)], [7, 2, 5], [3], [4, 5] * 40):
            some = {name: t[order][:, : max(lengths[i] for i in order)] for name, t in batch.items()}
            for i, result in zip(order, model(**some).last_hidden_state, strict=True):
                assert torch.equal(result[: lengths[i]], alone[i])
    torch.set_num_threads(2)
    long = quantized(family, max_position_embeddings=402)
    seen = batch["attention_mask"].bool()
    assert_close(long(**batch), modules(long, **batch), seen, 3e-6)


@pytest.mark.parametrize("family", ["mpnet", "nomic", "modernbert"])
@torch.no_grad()
def test_masks_with_holes(family: str, runs: list[torch.Tensor]) -> None:
    """Distances are of columns, so that rows before a hole are farther from those behind it than they lie packed."""
    model = quantized(family, add_pooling_layer=None) if family == "modernbert" else quantized(family)
    if family != "modernbert":
        model.pooler = None
    batch = sentences([9, 9])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 0], [1] * 9])
    runs.clear()
    assert_close(
        model(batch["input_ids"], mask), modules(model, batch["input_ids"], mask), mask.bool(), 2e-6
    )  # before and behind
    assert len(runs) == 1 and runs[0] is not None
    mask[0, 4] = 0
    ours, theirs = (f(batch["input_ids"], mask).last_hidden_state for f in (model, lambda *a: modules(model, *a)))
    assert (ours - theirs)[mask.bool()].abs().max() < 1e-5
    assert (runs[1] is not None) == (family == "nomic")


@pytest.mark.parametrize("engine", [*panels.NAMES])
@torch.no_grad()
def test_all_engines_give_the_same_bits(engine: str, tmp_path: Path) -> None:
    batch = sentences([30, 9, 1])
    for family in ("mpnet", "nomic", "modernbert"):
        folder = quantized_folder(tmp_path / family, family)
        results = [spicerack.load(folder, compute="int8", engine=name)(**batch) for name in (engine, "scalar")]
        assert torch.equal(results[0].last_hidden_state, results[1].last_hidden_state)


@torch.no_grad()
def test_rotary_positions_have_no_end(runs: list[torch.Tensor]) -> None:
    for family in ("nomic", "modernbert"):
        model = quantized(family)
        runs.clear()
        ids = sentences([60])["input_ids"]  # of 40 positions
        places = torch.arange(60)[None] + 100_000
        for given in (None, places, -places):
            ours, theirs = model(ids, position_ids=given), modules(model, ids, position_ids=given)
            assert_close(ours, theirs, torch.ones(1, 60, dtype=torch.bool), 3e-6)
        assert len(runs) == 3


@torch.no_grad()
def test_a_sentence_has_the_same_bits_in_every_batch(threads: None) -> None:
    model = quantized("roberta", compute="int8", max_position_embeddings=400)
    lengths = [3, 40, 1, 390, 17, 17, 2, 100]
    batch = sentences(lengths)
    alone = [
        model(row[None, :length]).last_hidden_state[0] for row, length in zip(batch["input_ids"], lengths, strict=True)
    ]
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        for order in ([*range(8)], [7, 2, 5], [3], [0, 0, 0, 1], [4, 5] * 40):
            some = {name: t[order][:, : max(lengths[i] for i in order)] for name, t in batch.items()}
            results = model(**some).last_hidden_state
            for i, result in zip(order, results, strict=True):
                assert torch.equal(result[: lengths[i]], alone[i])
    model.pooler = None
    holes = torch.zeros(1, 7, dtype=torch.long)
    mask = torch.tensor([[0, 1, 0, 0, 1, 1, 0]])
    holes[mask.bool()] = batch["input_ids"][0, :3]
    positions = torch.tensor([[0, 2, 0, 0, 3, 4, 0]])
    result = model(holes, attention_mask=mask, position_ids=positions).last_hidden_state
    assert torch.equal(result[0, [1, 4, 5]], alone[0])


def adapted(model: Any) -> None:
    inner = model.encoder.layer[1].output.dense

    class Adapter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.inner(x) + 1
            return y

    model.encoder.layer[1].output.dense = Adapter()


def watched(model: Any) -> None:
    model.encoder.layer[0].attention.self.query.register_forward_hook(lambda *_: None)


def before(model: Any) -> None:
    model.encoder.register_forward_pre_hook(lambda *_: None)


def another_forward(model: Any) -> None:
    dense = model.encoder.layer[0].intermediate
    dense.forward = lambda x: torch.nn.functional.gelu(dense.dense(x)) * 2


def another_weight(model: Any) -> None:
    norm = model.embeddings.LayerNorm
    norm.weight = nn.Parameter(norm.weight.detach() * 2)


def other_data(model: Any) -> None:
    model.embeddings.LayerNorm.weight.data = model.embeddings.LayerNorm.weight.data * 2


def another_layer(model: Any) -> None:
    model.encoder.layer[1].attention = copy.deepcopy(model.encoder.layer[0].attention)


def fewer_layers(model: Any) -> None:
    del model.encoder.layer[1]


def more_layers(model: Any) -> None:
    model.encoder.layer.append(copy.deepcopy(model.encoder.layer[0]))


def another_epsilon(model: Any) -> None:
    model.encoder.layer[0].output.LayerNorm.eps = 0.1


def another_config(model: Any) -> None:
    model.config.output_hidden_states = True


def torchs_attention(model: Any) -> None:
    model.set_attn_implementation("sdpa")


def another_class(model: Any) -> None:
    class Loud(type(model.encoder)):  # type: ignore[misc]
        pass

    model.encoder.__class__ = Loud


@pytest.mark.parametrize(
    "change",
    [adapted, more_layers, watched, before, another_forward, another_weight, other_data, another_layer, fewer_layers,
     another_epsilon, another_config, torchs_attention, another_class],
)  # fmt: skip
@torch.no_grad()
def test_modules_run_where_something_was_changed(change: Callable[[Any], None], runs: list[torch.Tensor]) -> None:
    model = quantized()
    batch = sentences([7, 4])
    model(**batch)
    change(model)
    runs.clear()
    result = model(**batch)
    assert not runs
    assert torch.equal(result.last_hidden_state, modules(model, **batch).last_hidden_state)


@pytest.mark.parametrize(
    "asked",
    [{"output_attentions": True}, {"output_hidden_states": True}, {"return_dict": False}, {"inputs_embeds": True},
     {"attention_mask": "4d"}, {"attention_mask": "float"}, {"attention_mask": "left"}, {"encoder_hidden_states": True},
     {"head_mask": True}],
)  # fmt: skip
@torch.no_grad()
def test_modules_run_where_a_plan_cannot_do_what_is_asked(asked: dict[str, Any], runs: list[torch.Tensor]) -> None:
    model = quantized()
    batch: dict[str, Any] = sentences([7, 4])
    runs.clear()
    mask = batch["attention_mask"]
    masks = {"4d": mask.bool()[:, None, None].expand(2, 1, 7, 7), "float": mask.float(), "left": mask.flip(1)}
    given = {**batch, **asked}
    if "attention_mask" in asked:
        given["attention_mask"] = masks[asked["attention_mask"]]
    if "inputs_embeds" in asked:
        given["inputs_embeds"] = model.embeddings.word_embeddings(given.pop("input_ids"))
    if "encoder_hidden_states" in asked:
        given["encoder_hidden_states"] = torch.zeros(2, 3, 64)
    if "head_mask" in asked:
        given["head_mask"] = torch.ones(2, 4)
    result, expected = model(**given), modules(model, **given)
    assert not runs and type(result) is type(expected)
    assert torch.equal(result[0], expected[0])
    model(**batch)
    assert len(runs) == 1, "what was asked once leaves nothing behind"


def in_training(model: Any) -> AbstractContextManager[Any]:
    model.train()
    return torch.no_grad()


def a_part_in_training(model: Any) -> AbstractContextManager[Any]:
    model.encoder.layer[0].attention.self.train()
    return torch.no_grad()


def with_gradients(_: Any) -> AbstractContextManager[Any]:
    return nullcontext()


def with_casts(model: Any) -> AbstractContextManager[Any]:
    model.requires_grad_(False)
    return torch.autocast("cpu", torch.bfloat16)


def in_a_trace(model: Any) -> AbstractContextManager[Any]:
    model.requires_grad_(False)
    return mock.patch("torch.jit.is_tracing", return_value=True)


class Counting(TorchDispatchMode):
    """Sees each operator of torch."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


def counting(model: Any) -> AbstractContextManager[Any]:
    model.requires_grad_(False)
    return Counting()


@pytest.mark.parametrize("mode", [in_training, a_part_in_training, with_gradients, with_casts, in_a_trace, counting])
def test_modules_run_in_other_modes(
    mode: Callable[[Any], AbstractContextManager[Any]], runs: list[torch.Tensor]
) -> None:
    model = quantized()
    runs.clear()
    with mode(model):
        result = model(**sentences([5])).last_hidden_state
    assert not runs
    assert result.requires_grad == (mode is with_gradients)


def test_gradients_reach_what_is_float() -> None:
    model = quantized()
    model(**sentences([5, 3])).last_hidden_state.sum().backward()
    assert model.embeddings.LayerNorm.weight.grad is not None
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert not model(**sentences([5])).last_hidden_state.requires_grad


def test_without_gradients_to_make_grad_mode_changes_nothing(runs: list[torch.Tensor]) -> None:
    model = quantized().requires_grad_(False)
    runs.clear()
    model(**sentences([5]))
    with torch.inference_mode():
        assert model(**sentences([5])).last_hidden_state.is_inference()
    assert len(runs) == 2


@torch.no_grad()
def test_torchs_defaults_do_not_matter(runs: list[torch.Tensor]) -> None:
    model = quantized()
    batch = sentences([5, 3])
    expected = model(**batch).last_hidden_state
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(model(**batch).last_hidden_state, expected) and len(runs) > 1
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def test_hooks_of_the_model_itself_run_as_ever(runs: list[torch.Tensor]) -> None:
    model = quantized()
    runs.clear()
    calls: list[Any] = []
    model.register_forward_hook(lambda _, given, output: calls.append(output))
    output = model(**sentences([5]))
    assert len(runs) == 1 and calls == [output]


@torch.no_grad()
def test_what_is_written_into_weights_counts(runs: list[torch.Tensor]) -> None:
    model = quantized()
    batch = sentences([5])
    first = model(**batch).last_hidden_state
    runs.clear()
    model.encoder.layer[1].output.LayerNorm.bias.add_(1)
    assert torch.allclose(model(**batch).last_hidden_state, first + 1, atol=1e-6) and len(runs) == 1


@pytest.mark.parametrize(
    "rules",
    [["encoder.layer.0.**=skip"], ["**.query=skip", "**.key=skip"], ["**.intermediate.dense=skip"],
     ["embeddings_project=skip", "**.output.dense=skip"]],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_layers_that_stayed_float(rules: list[str], dtype: torch.dtype, runs: list[torch.Tensor]) -> None:
    model: Any = spicerack.quantize(made("electra").to(dtype), "w8", compute="float", rules=rules)
    assert encoder.obstacles(model) == {"": None}
    batch = sentences([30, 1, 17])
    bound = 2e-6 if dtype == torch.float32 else 0.03
    runs.clear()
    assert_close(model(**batch), modules(model, **batch), batch["attention_mask"].bool(), bound)
    layer = next(m for m in model.modules() if type(m) is nn.Linear)
    layer.weight.mul_(2)
    assert_close(model(**batch), modules(model, **batch), batch["attention_mask"].bool(), bound)
    assert len(runs) == 2


@torch.no_grad()
def test_nomic_folders_have_their_attention_cut(tmp_path: Path) -> None:
    """Its checkpoints have one matrix for query, key and value, which is cut as transformers cuts it when it loads."""
    model: Any = spicerack.load(quantized_folder(tmp_path, "nomic"), compute="float")
    assert type(model.layers[0].self_attn.q_proj) is QLinear and encoder.obstacles(model) == {"": None}
    batch = sentences([9, 4, 17])
    assert_close(model(**batch), modules(model, **batch), batch["attention_mask"].bool(), 2e-6)


@torch.no_grad()
def test_biases_by_distance_are_read_at_each_call(runs: list[torch.Tensor]) -> None:
    model = quantized("mpnet")
    batch = sentences([9, 4])
    first = model(**batch).last_hidden_state
    runs.clear()
    model.encoder.relative_attention_bias.weight.mul_(-50)
    changed = model(**batch).last_hidden_state
    assert len(runs) == 1 and (changed - first).abs().max() > 0.01
    assert_close(model(**batch), modules(model, **batch), batch["attention_mask"].bool(), 2e-6)


def cast(model: Any) -> None:
    model.to(torch.bfloat16)


def cast_inside(model: Any) -> None:
    model.encoder.to(torch.bfloat16)


def cast_around(model: Any) -> None:
    nn.ModuleList([model]).half()


def moved_and_back(model: Any) -> None:
    model._apply(torch.clone)


def replaced(model: Any) -> None:
    for layer in list(model.modules()):
        if isinstance(layer, nn.LayerNorm):
            layer.weight = nn.Parameter(layer.weight.detach().clone())


@pytest.mark.parametrize("move", [cast, cast_around, moved_and_back, cast_inside, replaced])
@torch.no_grad()
def test_nobody_keeps_tensors_of_a_model_that_was_moved(move: Callable[[Any], None], runs: list[torch.Tensor]) -> None:
    model = quantized("bert")
    batch = sentences([9, 4])
    expected = model(**batch).last_hidden_state
    plans = weakref.ref(vars(model)[encoder._PLACE]._ready.built.plan)
    old = [weakref.ref(t) for t in plans()._tensors if not isinstance(t, nn.Parameter)]
    runs.clear()
    move(model)
    if move in (cast_inside, replaced):  # seen at the next call
        with suppress(RuntimeError):  # of modules of different types
            model(**batch)
        assert not runs
    gc.collect()
    assert plans() is None
    if move is moved_and_back:
        assert not any(t() for t in old)
    if move in (cast, cast_around, moved_and_back):
        again = model(**batch).last_hidden_state
        seen = batch["attention_mask"].bool()
        assert (again - expected)[seen].abs().max() < 0.03 and len(runs) > 1 and again.dtype == model.dtype


@torch.no_grad()
def test_a_model_that_nobody_has_any_more_is_gone_at_once() -> None:
    gc.collect()
    gc.disable()  # which would find it later, in a circle with itself
    try:
        model = quantized("bert")
        model(**sentences([9, 4]))
        duplicate = copy.deepcopy(model)
        duplicate(**sentences([9, 4]))
        method, gone = model.forward, [weakref.ref(model), weakref.ref(duplicate)]
        del model, duplicate
        assert [reference() for reference in gone] == [None, None]
        with pytest.raises(ReferenceError, match="forward"):
            method()
    finally:
        gc.enable()


def test_the_method_of_a_model_tells_the_arguments_of_its_class() -> None:
    model = quantized("bert")
    expected = inspect.signature(MethodType(type(model).forward, model))
    assert inspect.signature(model.forward) == expected and model.forward.__name__ == "forward"


@torch.no_grad()
def test_a_move_that_moves_nothing_costs_nothing(runs: list[torch.Tensor]) -> None:
    model = quantized("bert")
    batch = sentences([9, 4])
    runs.clear()
    ready = vars(model)[encoder._PLACE]._ready
    model.to("cpu").float()(**batch)
    assert len(runs) == 1 and vars(model)[encoder._PLACE]._ready is ready


@torch.no_grad()
def test_tracing_and_compiling_see_the_modules(runs: list[torch.Tensor]) -> None:
    model = quantized()
    batch = sentences([5, 3])
    expected = modules(model, **batch).last_hidden_state
    runs.clear()
    compiled = torch.compile(model, backend="eager")
    assert torch.allclose(compiled(**batch).last_hidden_state, expected, atol=1e-5)
    exported = torch.export.export(model, (), batch, strict=False)
    assert torch.allclose(exported.module()(**batch).last_hidden_state, expected, atol=1e-5)
    assert not runs


@torch.no_grad()
def test_copies_have_plans_of_their_own_and_names_stay(runs: list[torch.Tensor], tmp_path: Path) -> None:
    model = quantized()
    batch = sentences([5, 3])
    expected = model(**batch).last_hidden_state
    duplicate = copy.deepcopy(model)
    model.embeddings.word_embeddings.weight.zero_()
    runs.clear()
    assert torch.equal(duplicate(**batch).last_hidden_state, expected) and runs
    assert not torch.equal(model(**batch).last_hidden_state, expected)
    unpickled = pickle.loads(pickle.dumps(duplicate))
    difference = (unpickled(**batch).last_hidden_state - expected)[batch["attention_mask"].bool()]
    assert difference.abs().max() < 1e-5
    plain = made("bert").state_dict().keys()
    assert {name.replace(".packed", "") for name in model.state_dict() if "packed" not in name} <= set(plain)
    spicerack.save(duplicate, tmp_path / "out")
    loaded: Any = spicerack.load(tmp_path / "out", compute="float")
    assert torch.equal(loaded(**batch).last_hidden_state, expected)


@torch.no_grad()
def test_nan_stays_in_its_sentence() -> None:
    model = quantized(compute="int8")
    batch = sentences([6, 4, 5])
    expected = model(**batch).last_hidden_state
    batch["input_ids"][1, 2] = 98
    batch["input_ids"][[0, 2]] = batch["input_ids"][[0, 2]].clamp(max=97)
    others = model(**batch).last_hidden_state[[0, 2]]
    model.embeddings.word_embeddings.weight[98] = torch.nan
    result = model(**batch).last_hidden_state
    assert result[1, :4].isnan().all() and torch.equal(result[[0, 2]], others)
    assert expected.isfinite().all()


@torch.no_grad()
def test_bad_ids_are_named_and_a_batch_may_be_empty(runs: list[torch.Tensor]) -> None:
    model = quantized()
    ids = torch.full((2, 3), 5)
    ids[1, 2] = 99
    with pytest.raises(IndexError, match=r"id 99 at \[1, 2\]: the table has 99 rows"):
        model(ids)
    with pytest.raises(IndexError, match=r"token type 2 at \[0, 0\]: the table has 2 rows"):
        model(ids.clamp(max=9), token_type_ids=torch.full((2, 3), 2))
    with pytest.raises(IndexError, match=r"position 40 at \[0, 40\]: the table has 40 rows"):
        model(torch.zeros(1, 41, dtype=torch.long))
    assert model(torch.zeros(1, 40, dtype=torch.long)).last_hidden_state.shape == (1, 40, 64)
    assert model(torch.zeros(0, 5, dtype=torch.long)).last_hidden_state.shape == (0, 5, 64)
    runs.clear()
    with pytest.raises((RuntimeError, IndexError)):
        model(torch.zeros(2, 0, dtype=torch.long))
    assert not runs
    model.pooler = None
    nothing = model(ids.clamp(max=9), attention_mask=torch.zeros_like(ids))
    assert not nothing.last_hidden_state.any() and nothing.pooler_output is None


@torch.no_grad()
def test_large_results_get_the_memory_of_earlier_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = quantized(compute="int8"), sentences([9, 4, 30])
    expected = model(**batch).last_hidden_state
    taken: list[tuple[int, ...]] = []

    def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        taken.append(tuple(shape))
        return _native.pooled(shape, TYPES[dtype]).fill_(math.nan)

    monkeypatch.setattr(pool, "LARGE", 1)
    monkeypatch.setattr(pool, "empty", empty)
    assert torch.equal(model(**batch).last_hidden_state, expected)
    assert expected.shape in taken


@torch.no_grad()
def test_four_threads_at_once() -> None:
    model = quantized(compute="int8")
    batches = [sentences([9, 4 + i, 30], seed=i) for i in range(4)]
    expected = [model(**batch).last_hidden_state for batch in batches]
    right = [True] * 4

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(30):
                right[i] &= torch.equal(model(**batches[i]).last_hidden_state, expected[i])

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(right)
    assert spicerack.release_memory() > 0 and spicerack.release_memory() == 0
    assert torch.equal(model(**batches[0]).last_hidden_state, expected[0])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@torch.no_grad()
def test_a_forked_process_computes_the_same(threads: None) -> None:
    torch.set_num_threads(1)  # GNU's OpenMP has no team in a forked process
    model = quantized()
    batch = sentences([9, 4])
    expected = model(**batch).last_hidden_state
    child = os.fork()
    if not child:
        os._exit(int(not torch.equal(model(**batch).last_hidden_state, expected)))
    assert os.waitpid(child, 0)[1] == 0


def test_says_why_modules_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def why(
        family: str = "bert", rules: tuple[str, ...] = (), dtype: torch.dtype | None = None, **settings: Any
    ) -> Any:
        model = made(family, **settings)
        return encoder.obstacles(spicerack.quantize(model.to(dtype or torch.float32), "w8", rules=rules))[""]

    assert why(hidden_act="relu") == "encoder.layer.0.intermediate.intermediate_act_fn is a ReLU"
    assert why(num_attention_heads=8) == "widths of its heads are no multiples of 16"
    assert why(is_decoder=True) == "its config has is_decoder=True"
    assert why(chunk_size_feed_forward=2) == "its config has chunk_size_feed_forward=2"
    assert why("modernbert", num_attention_heads=8) == "widths of its heads are no multiples of 16"
    assert why("nomic", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}) == (
        "its rotary positions are dynamic"
    )
    assert why(dtype=torch.bfloat16) is None
    mixed = made("bert").bfloat16()
    mixed.embeddings.LayerNorm.float()
    assert encoder.obstacles(spicerack.quantize(mixed, "w8"))[""] == (
        "embeddings.LayerNorm is float32, and what comes before it is bfloat16"
    )
    assert why(rules=("encoder.layer.*.output.dense=skip",)) is None
    assert why(rules=("encoder.layer.**.dense=skip",)) == "more than half of its layers' weights are float"
    assert why(rules=("encoder.layer.1.intermediate.dense=nf4",)) == (
        "encoder.layer.1.intermediate.dense.packed is computed by the kernel reference"
    )
    turns = plan.Plan.turns
    monkeypatch.setattr(plan.Plan, "turns", lambda self, f, scale, y: turns(self, f, 30 * scale, y))
    assert why("nomic").startswith("its results differ from those of its modules by ")
    attention = plan.Plan.attention

    def unlimited(*args: Any, window: int | None, **others: Any) -> None:
        attention(*args, window=None, **others)

    monkeypatch.setattr(plan.Plan, "turns", turns)
    monkeypatch.setattr(plan.Plan, "attention", unlimited)
    assert why("modernbert").startswith("its results differ from those of its modules by ")
    monkeypatch.setattr(plan.Plan, "attention", attention)
    norm = plan.Plan.norm

    def wrong(*args: Any) -> None:
        norm(*args[:-1], 0.5)

    monkeypatch.setattr(plan.Plan, "norm", wrong)
    reason = why()
    assert reason.startswith("its results differ from those of its modules by ")


def test_a_subclass_and_an_encoder_inside(runs: list[torch.Tensor]) -> None:
    class Own(transformers.BertModel):
        pass

    config = made("bert").config
    assert encoder.obstacles(spicerack.quantize(Own(config).eval(), "w8")) == {}
    whole: Any = spicerack.quantize(transformers.BertForSequenceClassification(config).eval(), "w8", compute="float")
    assert encoder.obstacles(whole) == {"bert": None}
    runs.clear()
    with torch.no_grad():
        batch = sentences([5, 9])
        ours = whole(**batch).logits
        assert len(runs) == 1
        whole.bert.encoder.register_forward_hook(lambda *_: None)
        assert torch.allclose(ours, whole(**batch).logits, atol=1e-5) and len(runs) == 1


@torch.no_grad()
def test_minilm(tmp_path: Path, runs: list[torch.Tensor]) -> None:
    spicerack.quantize(bundled.encoder(), "w8", output=tmp_path / "out")
    model: Any = spicerack.load(tmp_path / "out", compute="float")
    assert encoder.obstacles(model) == {"": None}
    batch = sentences([16, 3, 128])
    runs.clear()
    seen = batch["attention_mask"].bool()
    assert_close(model(**batch), modules(model, **batch), seen, 1e-5)
    model.eval()(**batch)  # as sentence-transformers does
    assert len(runs) == 2
