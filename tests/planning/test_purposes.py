"""What a model is for decides which engines it may go to, and what is given to paste."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    BeitConfig,
    BeitForImageClassification,
    BertConfig,
    ConvNextConfig,
    ConvNextForImageClassification,
    DistilBertConfig,
    MarianConfig,
    MarianMTModel,
    PreTrainedModel,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from spicerack.errors import UsageError
from spicerack.machine import catalogue
from spicerack.planning import engine as engines
from spicerack.planning.engine import Request
from spicerack.planning.model import open_model
from spicerack.planning.plan import Goal, context_of, plan
from spicerack.storage import engine as stored_engines

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
BOTH = {f"{side}_{what}": n for side in ("encoder", "decoder")
        for what, n in (("layers", 2), ("ffn_dim", 64), ("attention_heads", 2))}  # fmt: skip


def small(kind: str) -> PreTrainedModel:
    if kind == "bert":
        return AutoModel.from_config(BertConfig(vocab_size=300, **SMALL))
    if kind == "distilbert":
        return AutoModel.from_config(DistilBertConfig(vocab_size=300, dim=32, hidden_dim=64, n_layers=2, n_heads=2))
    if kind == "vit":
        return ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, **SMALL))
    return MarianMTModel(
        MarianConfig(vocab_size=300, d_model=32, pad_token_id=1, decoder_start_token_id=1, eos_token_id=0, **BOTH)
    )


@pytest.mark.parametrize(
    ("kind", "does", "layers", "refusing", "word"),
    [
        ("bert", "embeddings", 2, ("mlx",), "load("),
        ("distilbert", "embeddings", 2, ("mlx",), "load("),
        ("vit", "pictures or sound", 2, ("llama.cpp", "mlx", "vllm"), "load("),
        ("marian", "sequences", 2, ("llama.cpp", "mlx"), "generate"),
    ],
)
def test_purposes(kind: str, does: str, layers: int, refusing: tuple[str, ...], word: str, tmp_path: Path) -> None:
    small(kind).save_pretrained(tmp_path)
    model = open_model(tmp_path)
    assert (model.does, len(model.layers)) == (does, layers)
    request = Request(context_of(model, None))
    for name in refusing:
        with pytest.raises(UsageError, match=does):
            plan(model, Goal(catalogue.find("M4" if name == "mlx" else "3090"), engines.get(name), request))
    called = plan(model, Goal(catalogue.find("3090"), engines.get("transformers"), request)).flags[0]
    assert called.startswith(f"{type(small(kind)).__name__}.from_pretrained(")
    made = plan(model, Goal(catalogue.find("Laptop, LPDDR5-6400"), engines.get("spicerack"), request))
    assert made.recommended is not None and word in made.flags[0]
    if does == "embeddings":
        served = plan(model, Goal(catalogue.find("3090"), engines.get("llama.cpp"), request))
        assert "--embeddings" in served.flags[0]


PICTURES = {  # blocks, pixels, tokens where there are most of them
    "convnext": (ConvNextForImageClassification, ConvNextConfig(hidden_sizes=[16, 32], depths=[1, 2], num_stages=2,
                 image_size=64), 3, 64, 256),
    "swin": (SwinForImageClassification, SwinConfig(embed_dim=16, depths=[1, 2], num_heads=[1, 2], image_size=[64, 32],
             window_size=4), 3, 64, 128),
    "beit": (BeitForImageClassification, BeitConfig(image_size=32, patch_size=8, **SMALL), 2, 32, 16),
    "vit": (ViTForImageClassification, ViTConfig(image_size=32, patch_size=8, **SMALL), 2, 32, 17),
}  # fmt: skip


@pytest.mark.parametrize("kind", PICTURES)
def test_a_picture_is_as_many_tokens_as_it_is_large(kind: str, tmp_path: Path) -> None:
    cls, config, blocks, height, tokens = PICTURES[kind]
    net = cls(config).eval()
    shapes: list[tuple[int, ...]] = []
    for module in net.modules():  # the longest sequence, or the most positions of a map, that a block is given
        if type(module).__name__ in ("ConvNextLayer", "SwinLayer", "BeitLayer", "ViTLayer"):
            module.register_forward_pre_hook(lambda _module, inputs: shapes.append(tuple(inputs[0].shape)))
    size = config.image_size if isinstance(config.image_size, list) else [config.image_size] * 2
    net(torch.zeros(1, 3, *size))
    net.save_pretrained(tmp_path)
    model = open_model(tmp_path)
    assert model.picture is not None
    assert (model.does, len(model.layers)) == ("pictures or sound", len(shapes)) == ("pictures or sound", blocks)
    most = max(shape[1] if len(shape) == 3 else shape[2] * shape[3] for shape in shapes)
    assert model.picture.height == height and most - 1 <= model.picture.tokens == tokens <= most
    assert context_of(model, None) == tokens == context_of(model, tokens)
    with pytest.raises(UsageError, match="tokens, not 512"):
        context_of(model, 512)
    goal = Goal(catalogue.find("3090"), engines.get("transformers"), Request(tokens, users=4))
    chosen = plan(model, goal)
    assert chosen.longest is None and chosen.recommended is not None
    assert sum(w.numel for w in model.weights) == sum(p.numel() for p in net.parameters())


def test_what_an_engine_reads_of_us_it_runs() -> None:
    """Families that files are written for are families that are planned for, by every engine that lists them."""
    for engine in (engine for engine in engines.all_engines() if engine.name != "spicerack"):
        ways = stored_engines.find(engine.name).reads
        listed = {family for way in ways for family in way.families or ()}
        assert engine.only is None or listed <= engine.only, engine.name
