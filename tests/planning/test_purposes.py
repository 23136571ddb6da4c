"""What a model is for decides which engines it may go to, and what is given to paste."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import (
    AutoModel,
    BertConfig,
    DistilBertConfig,
    MarianConfig,
    MarianMTModel,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from spicerack.errors import UsageError
from spicerack.machine import catalogue
from spicerack.planning import engine as engines
from spicerack.planning.engine import Request
from spicerack.planning.model import open_model
from spicerack.planning.plan import Goal, context_of, plan

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
