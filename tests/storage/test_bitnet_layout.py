"""The `bitnet` format: its bytes and transformers' own packing, and the same folders read by transformers and by us."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from dense import decoded_model, logits
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, BitNetForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config
from transformers import Qwen2ForCausalLM as Qwen2

import spicerack
from spicerack.errors import CheckpointError, UsageError
from spicerack.numerics.qtensor import QTensor
from spicerack.numerics.scheme import parse
from spicerack.storage import format
from spicerack.storage.format import StoredTensor
from spicerack.storage.reader import Checkpoint
from spicerack.training.qat import bitnet
from spicerack.training.qat.fake_layers import FakeLayer

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of torch, as transformers compiles

FMT, TERNARY = format.get("bitnet"), parse("ternarya8")
IDS = torch.randint(5, 90, (2, 9), generator=torch.Generator().manual_seed(0))
SIZES = {
    "vocab_size": 257, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _uncompiled() -> Iterator[None]:
    """transformers compiles its functions, which takes half a minute and changes nothing."""
    with torch.compiler.set_stance("force_eager"):
        yield


def theirs(folder: Path) -> torch.Tensor:
    """Logits of transformers, which wants accelerate for this format."""
    pytest.importorskip("accelerate")
    return logits(AutoModelForCausalLM.from_pretrained(folder), IDS)


def ours(folder: Path) -> torch.Tensor:
    return logits(spicerack.load(folder), IDS)


def trained_twin(dtype: torch.dtype = torch.float32) -> BitNetForCausalLM:
    """A tied BitNet model, prepared, some steps on."""
    model = BitNetForCausalLM(bitnet.twin_config(LlamaConfig(**SIZES, tie_word_embeddings=True))).to(dtype)
    model = spicerack.prepare_qat(model, "ternarya8")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    return model.eval()


def random_q(rows: int = 8, columns: int = 6, dtype: torch.dtype = torch.float16) -> QTensor:
    codes = torch.randint(-1, 2, (rows, columns), dtype=torch.int8)
    return QTensor(TERNARY, codes, torch.tensor([[0.37]], dtype=dtype))


# ---- bytes -----------------------------------------------------------------------------------------------------------


def test_golden_bytes() -> None:
    rows = [[-1, 0], [1, 1], [0, -1], [1, 0], [0, 1], [-1, -1], [-1, 1], [1, 0]]
    q = QTensor(TERNARY, torch.tensor(rows, dtype=torch.int8), torch.tensor([[1.5]], dtype=torch.bfloat16))
    stored = StoredTensor("p", TERNARY, (8, 2), source_dtype=torch.bfloat16)
    assert FMT.layout(stored) == {"p.weight": ("U8", (2, 2)), "p.weight_scale": ("BF16", (1,))}
    tensors = FMT.encode(stored, q)
    assert {name: t.tolist() for name, t in tensors.items()} == {
        "p.weight": [[0b00010100, 0b10100001], [0b10001010, 0b01000110]],
        "p.weight_scale": [1.5],
    }
    back = FMT.decode(stored, tensors)
    assert torch.equal(back.codes, q.codes) and torch.equal(back.scale, q.scale) and back.scale.dtype == torch.bfloat16


@pytest.mark.interop
def test_the_bytes_are_those_that_transformers_packs_and_unpacks() -> None:
    from transformers.integrations.bitnet import pack_weights, unpack_weights

    q = random_q(52, 17)
    packed = FMT.encode(StoredTensor("p", TERNARY, (52, 17)), q)["p.weight"]
    assert torch.equal(packed, pack_weights(q.codes.clone()))
    assert torch.equal(unpack_weights(packed, torch.float32), q.codes.float())


# ---- which contents are held ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "reason"),
    [
        (StoredTensor("a", parse("ternary"), (64, 64)), "no ternary, only ternarya8"),
        (StoredTensor("a", parse("w4t"), (64, 64)), "no w4t, only"),
        (StoredTensor("a", TERNARY, (62, 64)), "no 62 output rows"),
        (StoredTensor("a", TERNARY, (64, 64), bias=True), "no biases: transformers multiplies"),
        (StoredTensor("a", TERNARY, (64, 64), "router"), "no quantized router"),
        (StoredTensor("a", TERNARY, (64, 64), "conv1d", transposed=True), "no quantized conv1d"),
        (StoredTensor("a", TERNARY, (4, 64, 64), "experts"), "no quantized experts"),
        (StoredTensor("layers.0.experts.3.up", TERNARY, (64, 64)), "no packed experts"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_it_does_not_hold_goes_into_the_container(stored: StoredTensor, reason: str) -> None:
    contents = {p.module: p for p in (stored, StoredTensor("b", TERNARY, (64, 64)))}
    [obstacle] = FMT.obstacles(contents)
    assert obstacle.startswith(f"{stored.module}: bitnet has {reason}")
    assert format.choose(contents).name == "spicerack"
    assert format.portability(contents, [], format.Reading())[1] == f"the reason: {obstacle}"


def test_what_it_holds_is_written_so() -> None:
    contents = {
        "a": StoredTensor("a", TERNARY, (64, 64)),
        "lm_head": StoredTensor("lm_head", TERNARY, (64, 64), "head"),
    }
    assert format.choose(contents) == FMT
    [note] = format.portability(contents, [], format.Reading())
    assert "accelerate" in note


@pytest.mark.interop
def test_transformers_leaves_alone_what_is_not_packed_and_nothing_else() -> None:
    """Its names are regular expressions, beginnings and ends of names."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    contents = {
        m: StoredTensor(m, TERNARY, (64, 64)) for m in ("model.layers.1.proj", "model.layers.10.up", "model.lm_head")
    }
    floats = ["proj", "lm_head", "model.layers.1.up"]
    config = FMT.config({"model_type": "llama"}, contents, format.Reading(floats))
    section = config["quantization_config"]
    assert FMT.recognizes(config) and FMT.float_config(config) == {"model_type": "llama"}
    assert section.pop("modules_to_not_convert") == ["proj$", "lm_head$", "model.layers.1.up"]
    assert section == {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"}
    patterns = FMT.config({}, contents, format.Reading(floats))["quantization_config"]["modules_to_not_convert"]
    assert [m for m in (*contents, *floats) if should_convert_module(m, patterns)] == list(contents)


# ---- who reads the folders -------------------------------------------------------------------------------------------


@pytest.mark.interop
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("reference_kernel")
def test_transformers_reads_what_was_trained(tmp_path: Path, dtype: torch.dtype) -> None:
    model = trained_twin(dtype)
    out = spicerack.save(spicerack.freeze(model), tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["quantization_config"]["modules_to_not_convert"] == ["lm_head"]
    read_logits, mine = theirs(out), ours(out)
    tolerance = 2e-6 if dtype == torch.float32 else 4e-2  # bfloat16: transformers multiplies rounded activations
    assert torch.allclose(read_logits, logits(model, IDS), atol=tolerance)
    assert torch.allclose(read_logits, mine, atol=tolerance)
    read = AutoModelForCausalLM.from_pretrained(out)
    loaded = spicerack.load(out)
    trained = {name: layer for name, layer in model.named_modules() if isinstance(layer, FakeLayer)}
    assert len(trained) == 14
    for name, layer in trained.items():
        q, other = layer.qtensor(name), read.get_submodule(name)
        assert torch.equal(other.weight.to(torch.int8), q.codes)
        assert torch.equal(other.weight_scale.to(q.scale.dtype), q.scale.reshape(1))
        assert torch.equal(loaded.get_submodule(name).packed.qtensor().codes, q.codes)
        assert torch.equal(loaded.get_submodule(name).packed.qtensor().scale, q.scale)


@pytest.mark.interop
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rules", [[], ["model.layers.0.self_attn.*=skip", "lm_head=ternarya8"]], ids=["all", "rules"])
@pytest.mark.usefixtures("reference_kernel")
def test_transformers_reads_what_was_quantized(
    llama_folder: Callable[..., Path], tmp_path: Path, dtype: torch.dtype, rules: list[str]
) -> None:
    source = llama_folder(dtype=dtype, vocab_size=260)  # four rows to a byte
    spicerack.quantize(source, "ternarya8", output=tmp_path / "out", rules=rules)
    read_logits = theirs(tmp_path / "out")
    tolerance = (1e-5 if dtype == torch.float32 else 4e-2) * float(read_logits.float().abs().max())
    assert torch.allclose(read_logits, ours(tmp_path / "out"), atol=tolerance)
    from transformers.integrations.bitnet import ActQuant

    dense = decoded_model(LlamaForCausalLM, tmp_path / "out", tmp_path / "dense")
    packed = FMT.contents(Checkpoint.open(tmp_path / "out"))
    assert ("lm_head" in packed) == bool(rules) and len(packed) == (11 if rules else 14)
    for name in packed:
        dense.get_submodule(name).register_forward_pre_hook(lambda _, args: ActQuant.apply(args[0]))
    assert torch.allclose(read_logits, logits(dense, IDS), atol=tolerance)


def rewritten(folder: Path, section: dict[str, object], change: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    """The folder with another quantization_config, and scales changed, as other tools write it: no ledger."""
    tensors = {name: change(name, tensor) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": section}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "spicerack.json").unlink()
    return folder


@pytest.mark.usefixtures("reference_kernel")
def test_a_folder_like_bitnet_b158_2b_4t_is_read(tmp_path: Path) -> None:
    """bfloat16, tied, and no list of what is not packed."""
    out = spicerack.save(spicerack.freeze(trained_twin(torch.bfloat16)), tmp_path / "out")
    before = ours(out)
    section = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"}
    rewritten(out, section | {"modules_to_not_convert": None}, lambda _, tensor: tensor)
    assert load_file(out / "model.safetensors")["model.layers.0.mlp.up_proj.weight_scale"].dtype == torch.bfloat16
    assert torch.equal(ours(out), before)
    assert torch.allclose(theirs(out), before, atol=4e-2)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("reference_kernel")
def test_inverted_scales_are_read(tmp_path: Path, stored: torch.dtype) -> None:
    """linear_class "bitlinear", which is also what no linear_class means: outputs are divided by weight_scale."""
    out = spicerack.save(spicerack.freeze(trained_twin()), tmp_path / "out")
    rewritten(
        out, {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"]},
        lambda name, tensor: (1 / tensor.float()).to(stored) if name.endswith("_scale") else tensor,
    )  # fmt: skip
    assert torch.allclose(ours(out), theirs(out), atol=2e-6)
    with pytest.raises(UsageError, match=r"q_proj: its scales are torch.float32, which ternarya8 does not store"):
        spicerack.save(spicerack.load(out), tmp_path / "again")


def test_a_plain_module_goes_round(tmp_path: Path) -> None:
    def net() -> nn.Sequential:
        return nn.Sequential(nn.Linear(12, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False))

    small = spicerack.quantize(net(), "ternarya8", rules=["2=skip"])
    spicerack.save(small, tmp_path / "out")
    assert format.of_folder(Checkpoint.open(tmp_path / "out")) == FMT
    loaded, x = spicerack.load(tmp_path / "out", into=net()), torch.randn(3, 12)
    assert torch.equal(loaded(x), small(x))


# ---- biases ----------------------------------------------------------------------------------------------------------


def test_layers_with_biases_are_left_to_the_container(tmp_path: Path) -> None:
    """Because transformers multiplies biases too."""
    from transformers.integrations.bitnet import AutoBitLinear

    layer = AutoBitLinear(8, 4)
    nn.init.zeros_(layer.weight)
    layer.weight_scale.fill_(0.5)
    with torch.no_grad():
        assert torch.equal(layer(torch.ones(1, 8)), 0.5 * layer.bias[None])
    model = Qwen2(Qwen2Config(**SIZES | {"num_hidden_layers": 1}))
    model.save_pretrained(tmp_path / "model")
    spicerack.quantize(tmp_path / "model", "ternarya8", output=tmp_path / "out")
    spicerack.save(spicerack.quantize(model, "ternarya8"), tmp_path / "saved")
    for folder in ("out", "saved"):
        assert json.loads((tmp_path / folder / "config.json").read_text())["model_type"] == "spicerack"


# ---- strangers' folders ----------------------------------------------------------------------------------------------


def stranger(tmp_path: Path, tensors: dict[str, torch.Tensor], **section: object) -> Checkpoint:
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"model_type": "llama", "quantization_config": {"quant_method": "bitnet", **section}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return Checkpoint.open(tmp_path)


WEIGHT, SCALE = torch.zeros(2, 6, dtype=torch.uint8), torch.ones(1)
GOOD = {"a.weight": WEIGHT, "a.weight_scale": SCALE}


@pytest.mark.parametrize("kind", ["bitlinear", "autobitlinear", None])
def test_contents_are_read_from_the_tensors(tmp_path: Path, kind: str | None) -> None:
    checkpoint = stranger(tmp_path, {**GOOD, "norm.weight": torch.ones(4)}, **({"linear_class": kind} if kind else {}))
    assert format.of_folder(checkpoint) == FMT
    inverse = kind != "autobitlinear"
    assert FMT.contents(checkpoint) == {"a": StoredTensor("a", TERNARY, (8, 6), inverse_scale=inverse)}


@pytest.mark.parametrize(
    ("tensors", "section", "message"),
    [
        ({"a.weight": WEIGHT}, {}, r"a\.weight_scale is missing"),
        ({"a.weight_scale": SCALE}, {}, r"a\.weight is missing"),
        ({**GOOD, "a.weight": WEIGHT.char()}, {}, r"a\.weight is I8 \[2, 6\], not U8"),
        ({**GOOD, "a.weight": WEIGHT[0]}, {}, r"a\.weight is U8 \[6\], not U8"),
        ({**GOOD, "a.weight": WEIGHT[:0]}, {}, r"a\.weight is U8 \[0, 6\], not U8"),
        ({**GOOD, "a.weight_scale": torch.ones(8, 1)}, {}, r"a\.weight_scale is F32 \[8, 1\], not one float"),
        ({**GOOD, "a.weight_scale": SCALE.byte()}, {}, r"a\.weight_scale is U8 \[1\], not one float"),
        ({"a.weight": torch.ones(4, 4)}, {}, "has no packed weights"),
        ({**GOOD, "a.bias": torch.ones(8)}, {"linear_class": "autobitlinear"}, r"a\.bias: transformers' autobitlinear"),
        (GOOD, {"linear_class": "linear"}, "linear_class 'linear'"),
        (GOOD, {"linear_class": ["bitlinear"]}, "linear_class"),
        (GOOD, {"linear_class": "autobitlinear", "quantization_mode": "online"}, "weights are float"),
        (GOOD, {"use_rms_norm": True}, "use_rms_norm"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], section: dict[str, object], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        FMT.contents(stranger(tmp_path, tensors, **section))


@pytest.mark.parametrize(
    ("weight", "scale", "inverse", "message"),
    [
        (WEIGHT | 0b00110000, SCALE, False, "a code that is none of -1, 0 and 1"),
        (WEIGHT, SCALE * torch.nan, False, "a scale of nan"),
        (WEIGHT, SCALE * torch.inf, False, "a scale of inf"),
        (WEIGHT, SCALE * 0, True, "a scale of inf"),
        (WEIGHT, SCALE * torch.nan, True, "a scale of nan"),
    ],
)
def test_damaged_values_are_refused(weight: torch.Tensor, scale: torch.Tensor, inverse: bool, message: str) -> None:
    stored = StoredTensor("a", TERNARY, (8, 6), inverse_scale=inverse)
    with pytest.raises(CheckpointError, match=message):
        FMT.decode(stored, {"a.weight": weight, "a.weight_scale": scale})


def test_a_folder_of_another_shape_is_refused_by_its_layer(tmp_path: Path) -> None:
    out = spicerack.save(spicerack.freeze(trained_twin()), tmp_path / "out")
    section = json.loads((out / "config.json").read_text())["quantization_config"]
    rewritten(out, section, lambda name, t: t[:-1].clone() if name == "model.layers.1.mlp.up_proj.weight" else t)
    with pytest.raises(spicerack.errors.LoadError, match=r"layers.1.mlp.up_proj: packed \[92, 64\], but"):
        spicerack.load(out)
