"""Encoders of images: the model's own code makes the states that blocks begin with, and one native call is the rest."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import spicerack
from spicerack.kernels import panels, plan
from spicerack.nn.encoder import whole as encoder
from spicerack.runtime.whole import whole_parts

# patches are made by a convolution, which in models as narrow as these is much of the weights
pytestmark = pytest.mark.filterwarnings("ignore:.*of the weights in matrices stay in float")

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViT", SIZES),
    "vit of oblong images": ("ViT", {**SIZES, "image_size": (16, 32)}),
    "deit": ("DeiT", SIZES),
    "dinov2": ("Dinov2", {**SIZES, "mlp_ratio": 2, "layerscale_value": 0.7, "drop_path_rate": 0.1}),
    "clip": ("CLIPVision", SIZES),
    "siglip": ("SiglipVision", {**SIZES, "hidden_act": "gelu_pytorch_tanh"}),
    "siglip without a head": ("SiglipVision", {**SIZES, "vision_use_head": False}),
}


def made(family: str, **settings: Any) -> Any:
    """A random float model, whose norms, biases and factors are random, too; weights are large enough that attention
    matters."""
    name, sizes = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**sizes, **settings})
    model = getattr(transformers, f"{name}Model")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
            elif parameter.dim() == 2 and parameter.std() < 0.05:
                parameter *= 5
    return model


def quantized(family: str, scheme: str = "w8", compute: Any = "float", **settings: Any) -> Any:
    return spicerack.quantize(made(family, **settings), scheme, compute=compute)


def images(model: Any, count: int = 3) -> torch.Tensor:
    size = model.config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def modules(model: Any, *args: Any, **asked: Any) -> Any:
    return type(model).forward(model, *args, **asked)


def assert_close(ours: Any, theirs: Any, bound: float) -> None:
    assert type(ours) is type(theirs) and ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert ours[name].dtype == expected.dtype
        assert (ours[name] - expected).abs().max() <= bound * expected.abs().max(), name


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Results of plans."""
    results: list[Any] = []
    run = plan.Plan.run

    def counted(*args: Any) -> Any:
        results.append(run(*args))
        return results[-1]

    monkeypatch.setattr(plan.Plan, "run", counted)
    return results


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("scheme", "compute", "bound"), [("w8", "float", 3e-6), ("w8", "int8", 0.05), ("w4g32", "float", 3e-6)]
)
@torch.no_grad()
def test_gives_what_the_modules_give(family: str, scheme: str, compute: Any, bound: float, runs: list[Any]) -> None:
    model = quantized(family, scheme, compute)
    assert encoder.obstacles(model) == {"": None}
    runs.clear()
    pixels = images(model)
    assert_close(model(pixels), modules(model, pixels), bound)
    assert_close(model(pixel_values=pixels.double(), return_dict=True), modules(model, pixels), bound)
    assert len(runs) == 2
    if "interpolate_pos_encoding" in str(type(model).forward.__doc__) and "oblong" not in family:
        larger = torch.randn(1, 3, 48, 32, generator=torch.Generator().manual_seed(2))
        asked = {"interpolate_pos_encoding": True}
        assert_close(model(larger, **asked), modules(model, larger, **asked), bound)


@pytest.mark.parametrize("family", ["vit", "dinov2", "clip"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_a_narrow_model_is_nearer_to_float32_than_its_modules(family: str, dtype: torch.dtype, runs: list[Any]) -> None:
    narrow: Any = spicerack.quantize(made(family).to(dtype), "w8", compute="float")
    wide = copy.deepcopy(narrow).float()
    pixels = images(narrow)
    runs.clear()
    ours, exact = narrow(pixels).last_hidden_state, modules(wide, pixels.to(dtype).float()).last_hidden_state
    theirs = modules(narrow, pixels).last_hidden_state
    assert len(runs) == 1 and ours.dtype == theirs.dtype == dtype
    assert (ours.float() - exact).abs().mean() < 0.8 * (theirs.float() - exact).abs().mean()


@torch.no_grad()
def test_an_image_has_the_same_bits_in_every_batch(threads: None, tmp_path: Path) -> None:
    made("vit").save_pretrained(tmp_path / "original")
    spicerack.quantize(tmp_path / "original", "w8", output=tmp_path / "out")
    model: Any = spicerack.load(tmp_path / "out", compute="int8")
    pixels = images(model, 20)
    states = model.embeddings(pixels)  # torch's, which may depend on the batch
    expected: list[torch.Tensor] = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        built = vars(model)[encoder._PLACE]._ready.built
        for order in ([0], [3, 0, 2], [*range(20)]):
            result = built.plan.run(plan.Inputs(states=states[order]), built.result)
            expected = expected or [result[0]]
            assert torch.equal(result[order.index(0)], expected[0])
    for engine in panels.NAMES:
        loaded: Any = spicerack.load(tmp_path / "out", compute="int8", engine=engine)
        built = vars(loaded)[encoder._PLACE]._ready.built
        assert torch.equal(built.plan.run(plan.Inputs(states=states[:1]), built.result)[0], expected[0])


def adapted(model: Any) -> None:
    inner = model.layers[1].mlp.fc2
    model.layers[1].mlp.fc2 = nn.Sequential(inner, nn.Tanh())


def watched(model: Any) -> None:
    model.layers[0].attention.register_forward_hook(lambda *_: None)


def another_norm(model: Any) -> None:
    model.layernorm.eps = 0.5


@pytest.mark.parametrize("change", [adapted, watched, another_norm])
@torch.no_grad()
def test_modules_run_where_something_was_changed(change: Callable[[Any], None], runs: list[Any]) -> None:
    model = quantized("vit")
    change(model)
    runs.clear()
    pixels = images(model)
    assert torch.equal(model(pixels).last_hidden_state, modules(model, pixels).last_hidden_state)
    assert not runs


@pytest.mark.parametrize(
    "asked", [{"output_attentions": True}, {"output_hidden_states": True}, {"return_dict": False},
              {"attention_mask": torch.ones(3, 17)}],
)  # fmt: skip
@torch.no_grad()
def test_modules_run_where_a_plan_cannot_do_what_is_asked(asked: dict[str, Any], runs: list[Any]) -> None:
    model = quantized("vit")
    runs.clear()
    pixels = images(model)
    ours, theirs = model(pixels, **asked), modules(model, pixels, **asked)
    assert not runs and type(ours) is type(theirs) and torch.equal(ours[0], theirs[0])


def test_gradients_reach_the_image(runs: list[Any]) -> None:
    model = quantized("vit").requires_grad_(False)
    runs.clear()
    pixels = images(model).requires_grad_()
    model(pixels).last_hidden_state.sum().backward()
    assert pixels.grad is not None and not runs
    model(pixels.detach())
    assert len(runs) == 1


@torch.no_grad()
def test_the_embedding_and_the_pooler_are_the_models_own(runs: list[Any]) -> None:
    model = quantized("vit", **{})
    pixels, seen = images(model), []
    model.embeddings.register_forward_hook(lambda *_: seen.append("embeddings"))
    model.pooler.register_forward_hook(lambda *_: seen.append("pooler"))
    runs.clear()
    model(pixels)
    assert seen == ["embeddings", "pooler"] and len(runs) == 1
    with pytest.raises(ValueError, match="doesn't match model"):
        model(torch.zeros(1, 3, 40, 40))
    assert model(images(model, 0)).last_hidden_state.shape == (0, 17, 64)


@torch.no_grad()
def test_inside_of_another_model(tmp_path: Path, runs: list[Any]) -> None:
    text = {key: SIZES[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
    config = transformers.CLIPConfig(
        text_config={**text, "vocab_size": 99, "eos_token_id": 2}, vision_config=SIZES, projection_dim=64
    )
    transformers.CLIPModel(config).eval().save_pretrained(tmp_path / "original")
    spicerack.quantize(tmp_path / "original", "w8", output=tmp_path / "out")
    assert whole_parts(tmp_path / "out") == {"vision_model": None}
    model: Any = spicerack.load(tmp_path / "out")
    runs.clear()
    model.get_image_features(pixel_values=images(model.vision_model))
    assert len(runs) == 1


def test_says_why_modules_run() -> None:
    def why(family: str, **settings: Any) -> Any:
        return encoder.obstacles(quantized(family, **settings))[""]

    assert why("vit", hidden_act="relu") == "layers.0.mlp.activation_fn is a ReLU"
    assert why("dinov2", use_swiglu_ffn=True) == "encoder.layer.0.mlp is a Dinov2SwiGLUFFN"
    assert why("clip", num_attention_heads=8) == "widths of its heads are no multiples of 16"
