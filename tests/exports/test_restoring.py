"""Out to GGUF and in again: the very QTensors, also where a type of ggml says their scheme in another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ggufs import folder, written
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import spicerack
from spicerack.exports import restoring
from spicerack.exports.targets import _gguf_plan as plans
from spicerack.numerics import codec
from spicerack.numerics.qtensor import QTensor
from spicerack.numerics.scheme import parse
from spicerack.runtime.folder import Folder
from spicerack.storage.format import StoredTensor
from spicerack.storage.gguf import blocks
from spicerack.storage.gguf.ggml import TYPES
from spicerack.storage.gguf.metadata import Value


def quantized(scheme: str, place: Path, dtype: str = "float32") -> Path:
    """A llama, 256 wide, in a scheme."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(AutoTokenizer.from_pretrained(folder("llama"))), hidden_size=256, intermediate_size=256,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(place / "float")
    AutoTokenizer.from_pretrained(folder("llama")).save_pretrained(place / "float")
    spicerack.quantize(place / "float", scheme, output=place / "q")
    return place / "q"


def weights(place: Path) -> dict[str, QTensor]:
    opened = Folder.open(place)
    return {module: opened.packed(stored) for module, stored in opened.contents.items()}


@pytest.mark.parametrize(
    ("scheme", "dtype", "type_"),
    [
        ("w4g128", "float32", "Q4_0"), ("w4g128", "float16", "Q4_0"), ("w4", "float32", None),
        ("w3g64", "float32", None),
        ("w2g64", "float32", None), ("w2g32h", "float32", None), ("ternary", "float32", None),
        ("w8", "float32", "Q8_0"),
    ],
)  # fmt: skip
def test_the_very_codes_come_back(scheme: str, dtype: str, type_: str | None, tmp_path: Path) -> None:
    before = weights(quantized(scheme, tmp_path, dtype))
    spicerack.export(tmp_path / "q", to="gguf", output=tmp_path / "m.gguf")
    told = Folder.open(tmp_path / "m.gguf").contents.values()
    assert {stored.scheme.name for stored in told} != {scheme}
    if type_ is not None:
        assert {stored.variant for stored in told} == {type_}
    spicerack.import_model(tmp_path / "m.gguf", output=tmp_path / "back")
    after = weights(tmp_path / "back")
    assert after.keys() == before.keys()
    for module, q in before.items():
        r = after[module]
        assert r.scheme == q.scheme
        assert torch.equal(r.codes, q.codes) and torch.equal(r.plain_scale, q.plain_scale), module
        assert r.plain_scale.dtype == q.plain_scale.dtype


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nvfp4_goes_out_and_comes_in_with_its_scale_of_the_tensor(dtype: str, tmp_path: Path) -> None:
    before = weights(quantized("nvfp4", tmp_path, dtype))
    out = spicerack.export(tmp_path / "q", to="gguf", output=tmp_path / "m.gguf")
    assert out.verified_by.startswith("gguf-py") and not out.rounded
    spicerack.import_model(tmp_path / "m.gguf", output=tmp_path / "back")
    direct = weights(tmp_path / "m.gguf")
    for after in (direct, weights(tmp_path / "back")):
        for module, q in before.items():
            r = after[module]
            assert isinstance(q.scale, QTensor) and isinstance(r.scale, QTensor)
            assert float(q.scale.plain_scale.max()) != 1
            assert torch.equal(r.codes, q.codes) and torch.equal(r.scale.codes, q.scale.codes)
            assert torch.equal(r.scale.plain_scale, q.scale.plain_scale)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        logits = [spicerack.load(tmp_path / name).float()(ids).logits for name in ("m.gguf", "back")]
    assert torch.equal(*logits)


LIES: dict[str, Any] = {
    "groups": json.dumps({"blk.0.attn_q.weight": "w4g128"}),
    "nothing": json.dumps({"blk.0.attn_q.weight": "w99"}),
    "shape": json.dumps({"blk.0.attn_q.weight": "w4g96"}),
    "minima": json.dumps({"blk.0.attn_q.weight": "w4g32z"}),
    "fewer": json.dumps({"blk.0.attn_q.weight": "ternary"}),
    "stacked": json.dumps({"blk.0.attn_q.weight": "q4_k"}),
    "list": "[1]",
    "number": json.dumps({"blk.0.attn_q.weight": 4}),
    "broken": "{",
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("lie", LIES)
def test_a_file_that_says_otherwise_is_not_believed(lie: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized("w4g32", tmp_path)
    metadata = plans.metadata
    monkeypatch.setattr(
        plans, "metadata", lambda *args: {**metadata(*args), restoring.SCHEMES: Value("string", LIES[lie])}
    )
    written(tmp_path / "q", tmp_path / "m.gguf")
    spicerack.import_model(tmp_path / "m.gguf", output=tmp_path / "back")
    before, after = weights(tmp_path / "q"), weights(tmp_path / "back")
    assert {q.scheme.name for q in after.values()} == {"w4g32"}
    assert all(torch.equal(after[module].codes, q.codes) for module, q in before.items())


def test_zero_points_come_back_from_minima() -> None:
    """Where float16 holds each product of scale and zero point, Q4_1 has them."""
    scheme = parse("w4g64z")
    q = codec.encode(torch.randn(8, 128, generator=torch.Generator().manual_seed(0)), scheme)
    q = QTensor(scheme, q.codes, q.plain_scale.float().mul(64).round().div(64).clamp(1 / 64).half(), q.zero)
    type_ = TYPES["Q4_1"]
    own = blocks.decode(type_, blocks.encode(type_, q))
    back = restoring._restore(own, StoredTensor("m", scheme, (8, 128)), type_)
    assert back is not None and q.zero is not None and back.zero is not None
    assert torch.equal(back.codes, q.codes) and torch.equal(back.zero, q.zero)
    assert torch.equal(back.plain_scale, q.plain_scale)
