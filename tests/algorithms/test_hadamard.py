"""Rotations: matrices by their definition, logits before anything is rounded, and whole runs."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import families
import pytest
import torch
from conftest import LlamaFolder
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import spicerack
from spicerack.algorithms.transforms import hadamard
from spicerack.errors import RecipeError
from spicerack.models.families.residual import RESIDUAL
from spicerack.quantization.rotation import rotate
from spicerack.storage.reader import Checkpoint
from spicerack.text.calibration import Calibration

KNOWN = [f for f, (config, *_) in families.FAMILIES.items() if families.vars_of(config).model_type in RESIDUAL]


@pytest.mark.parametrize("n", [1, 2, 8, 12, 20, 28, 36, 44, 60, 64, 96, 768, 1280])
def test_all_of_it_is_a_hadamard_matrix(n: int) -> None:
    """H H^T = n I with entries +-1, whatever the signs."""
    h = hadamard.rotate(torch.eye(n), seed=3) * n**0.5
    torch.testing.assert_close(h.abs(), torch.ones(n, n), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(h @ h.t(), n * torch.eye(n), rtol=0, atol=n * 1e-5)


@pytest.mark.parametrize("n", [22, 11008])
def test_sizes_without_a_matrix_are_block_diagonal(n: int) -> None:
    two, m = hadamard.factors(n)
    assert m == 1 and n % two == 0
    x = torch.randn(3, n, generator=torch.Generator().manual_seed(0))
    y = hadamard.rotate(x)
    torch.testing.assert_close(y.norm(dim=1), x.norm(dim=1))
    one = torch.zeros(1, n)
    one[0, 0] = 1
    assert int((hadamard.rotate(one) != 0).sum()) == two


def test_powers_of_two_are_sylvesters() -> None:
    """Built by Kronecker products, the definition; the signs turn rows only."""
    dense = functools.reduce(torch.kron, [torch.tensor([[1.0, 1.0], [1.0, -1.0]])] * 6) / 8
    matrix = hadamard.rotate(torch.eye(64), seed=0)
    assert torch.equal(matrix.sign() * matrix[:, :1].sign(), dense.sign())


def test_what_stands_out_is_spread() -> None:
    one = torch.zeros(1, 256)
    one[0, 17] = 100.0
    assert torch.equal(hadamard.rotate(one).abs(), torch.full((1, 256), 100 / 16))


@pytest.mark.parametrize("family", KNOWN)
@torch.no_grad()
def test_logits_stay(family: str, tmp_path: Path) -> None:
    model = families.build(family).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter += 0.5 * torch.rand(parameter.shape, generator=generator)
    model.save_pretrained(tmp_path / "float")
    turned = rotate(Checkpoint.open(tmp_path / "float"), "hadamard")
    (tmp_path / "turned").mkdir()
    save_file({name: turned.read(name) for name in turned.tensors}, tmp_path / "turned" / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    (tmp_path / "turned" / "config.json").write_text(json.dumps(turned.config))
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "turned").eval()
    ids = torch.randint(3, 90, (2, 16), generator=generator)
    before, after = model(input_ids=ids).logits, other(input_ids=ids).logits
    assert float((after - before).norm() / before.norm()) < 1e-4
    assert not torch.equal(other.get_input_embeddings().weight, model.get_input_embeddings().weight)


def decided(vocabulary: int) -> Calibration:
    ids = torch.randint(3, vocabulary, (12, 24), generator=torch.Generator().manual_seed(0))
    return Calibration(ids, None, "of no text", 0.0, "made up")


@pytest.mark.parametrize("method", ["hadamard", "hadamard+hqq", "hadamard+gptq", "hadamard+awq+gptq"])
@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_a_rotated_model_is_quantized(method: str, tied: bool, llama_folder: LlamaFolder, tmp_path: Path) -> None:
    source = llama_folder(tie_word_embeddings=tied)
    text = decided(200) if "gptq" in method else None
    spicerack.quantize(source, "w8", output=tmp_path / "out", method=method, calibration=text)
    out, model = spicerack.load(tmp_path / "out", compute="float"), spicerack.load(source)
    ids = torch.randint(3, 200, (2, 16), generator=torch.Generator().manual_seed(5))
    before, after = model(input_ids=ids).logits, out(input_ids=ids).logits
    assert float((after - before).norm() / before.norm()) < 0.02
    ledger = json.loads((tmp_path / "out" / "spicerack.json").read_text())
    assert ledger["identity"]["recipe"]["method"].startswith("hadamard")


def test_streams_that_are_not_known_are_refused(tmp_path: Path) -> None:
    families.build("gpt2").save_pretrained(tmp_path / "gpt2")
    with pytest.raises(RecipeError, match="GPT2LMHeadModel is not known"):
        spicerack.quantize(tmp_path / "gpt2", "w8", output=tmp_path / "out", method="hadamard")
    with pytest.raises(RecipeError, match="comes first"):
        spicerack.quantize(tmp_path / "gpt2", "w8", output=tmp_path / "out", method="awq+hadamard+gptq")
