"""All experts in one tensor, in GGUF: gpt-oss as it is released in MXFP4, shares of rows, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from ggufs import folder, written
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Mxfp4Config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import spicerack
from spicerack.errors import CheckpointError, OutputError, SchemeError, UsageError
from spicerack.exports.export import export, import_model
from spicerack.exports.targets import _gguf_plan as plans
from spicerack.models.gguf import config as configs
from spicerack.models.gguf.checkpoint import GgufCheckpoint
from spicerack.models.gguf.family import of_type
from spicerack.models.gguf.names import Names, Share
from spicerack.runtime.folder import Folder
from spicerack.storage.gguf.ggml import TYPES, TensorSpec
from spicerack.storage.gguf.reader import GgufFile
from spicerack.storage.gguf.writer import GgufWriter

Tensors = dict[str, torch.Tensor]
EXPERTS = "model.layers.0.mlp.experts"


def released(place: Path) -> tuple[Path, Tensors]:
    """gpt-oss as OpenAI released it: experts as blocks and scales, all else in bfloat16."""
    shutil.copytree(folder("gpt_oss"), place)
    tensors = {name: t.to(torch.bfloat16) for name, t in load_file(place / "model.safetensors").items()}
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        shape = experts, outputs, inputs // 32, 16
        tensors[f"{name}_blocks"] = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        tensors[f"{name}_scales"] = torch.randint(118, 124, shape[:-1], dtype=torch.uint8, generator=generator)
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((place / "config.json").read_text())
    section = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (place / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16", "quantization_config": section}))
    return place, tensors


def codes_of(rows: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Blocks of ggml's MXFP4, [.., N, 17 G] -> scales [.., N, G] and codes [.., N, 32 G]: the low halves of 16 bytes
    are the first 16 codes, the high ones the others (formats of llama.cpp: ggml-common.h, block_mxfp4)."""
    blocks = rows.reshape(*rows.shape[:-1], -1, 17)
    codes = np.concatenate([blocks[..., 1:] & 15, blocks[..., 1:] >> 4], -1)
    return blocks[..., 0], codes.reshape(*rows.shape[:-1], -1)


def test_a_release_in_mxfp4_keeps_its_codes(tmp_path: Path) -> None:
    """Bit for bit, gate and up in two tensors; gguf-py reads transformers' numbers; and they come back from the file,
    and from a folder that is imported from either."""
    release, tensors = released(tmp_path / "release")
    result = export(release, to="gguf", output=tmp_path / "tiny.gguf")
    assert result.verified_by.startswith("gguf-py") and (result.packed, result.floats) == (4, 33)
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors}
    for name, rows in (("down", slice(None)), ("gate", slice(0, None, 2)), ("up", slice(1, None, 2))):
        own = f"{EXPERTS}.{'down' if name == 'down' else 'gate_up'}_proj"
        blocks, scales = tensors[f"{own}_blocks"], tensors[f"{own}_scales"]
        tensor = theirs[f"blk.0.ffn_{name}_exps.weight"]
        assert tensor.tensor_type.name == "MXFP4"
        told, codes = codes_of(np.asarray(tensor.data))
        assert np.array_equal(told, scales[:, rows].numpy())
        halves = torch.stack((blocks & 15, blocks >> 4), -1).flatten(2)
        assert np.array_equal(codes, halves[:, rows].numpy())
        floats = convert_moe_packed_tensors(blocks, scales).transpose(1, 2)[:, rows].float()
        assert np.array_equal(gguf.dequantize(tensor.data, tensor.tensor_type), floats.numpy())
        bias = tensors[f"{own}_bias"][:, rows].float().numpy()
        assert np.array_equal(theirs[f"blk.0.ffn_{name}_exps.bias"].data, bias)
    import_model(release, output=tmp_path / "folder")
    import_model(tmp_path / "tiny.gguf", output=tmp_path / "again")
    for path in ("tiny.gguf", "folder", "again"):
        opened = Folder.open(tmp_path / path)
        q = opened.packed(opened.contents[f"{EXPERTS}.gate_up_proj"])
        blocks = tensors[f"{EXPERTS}.gate_up_proj_blocks"]
        assert q.scheme.name == "mxfp4" and q.transposed
        assert torch.equal(q.codes, torch.stack((blocks & 15, blocks >> 4), -1).flatten(2))
        assert torch.equal(q.plain_scale.view(torch.uint8), tensors[f"{EXPERTS}.gate_up_proj_scales"])


@pytest.mark.slow
def test_llama_cpp_computes_a_release_as_transformers_does(tmp_path: Path) -> None:
    """To what it rounds inputs of layers to 8 bits: measured 0.011 in log-probabilities, whose spread is 0.16."""
    from test_gguf import IDS, llama_cpp

    release, _ = released(tmp_path / "release")
    export(release, to="gguf", output=tmp_path / "tiny.gguf")
    model = AutoModelForCausalLM.from_pretrained(
        release, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.float32
    )
    with torch.no_grad():
        ours = torch.log_softmax(model(input_ids=torch.tensor([IDS])).logits[0], -1)
    server, compared = llama_cpp(tmp_path / "tiny.gguf"), 0
    for length in (4, 9, 13, 17, 20):
        answer = server.handle_completions({"prompt": IDS[:length], "n_predict": 1, "temperature": 0, "n_probs": 10})
        told = answer["choices"][0]["logprobs"]
        for one in told["content"][0]["top_logprobs"] if told else ():
            assert abs(one["logprob"] - float(ours[length - 1][one["id"]])) < 0.03
            compared += 1
    assert compared >= 10


def test_rows_of_a_stack_are_read_alone(tmp_path: Path) -> None:
    """Experts of it, of floats and of what is packed; and of a bias, which is in two tensors, too."""
    spicerack.quantize(folder("gpt_oss"), "w4g32", rules=["**.down_proj=skip"], output=tmp_path / "q")
    checkpoint = GgufCheckpoint.open(written(tmp_path / "q", tmp_path / "m.gguf")).held()
    whole = load_file(folder("gpt_oss") / "model.safetensors")
    for name in (f"{EXPERTS}.gate_up_proj.weight", f"{EXPERTS}.gate_up_proj_bias", f"{EXPERTS}.down_proj"):
        assert torch.equal(checkpoint.read_rows(name, 1, 3), checkpoint.read(name)[1:3])
        assert name not in whole or torch.equal(checkpoint.read(name), whole[name])
        checkpoint.release(name)
    assert checkpoint.packed(f"{EXPERTS}.gate_up_proj.weight") == ("Q4_0", (4, 64, 128))


def test_shares_deal_rows_by_turns_or_in_runs() -> None:
    assert [list(range(6)[Share(i, 2, True).of(6)]) for i in (0, 1)] == [[0, 2, 4], [1, 3, 5]]
    assert [list(range(6)[Share(i, 2, False).of(6)]) for i in (0, 1)] == [[0, 1, 2], [3, 4, 5]]
    places = Names(of_type("granitemoe")).places("layers.7.block_sparse_moe.input_linear.weight")
    assert [place.tensor for place in places] == ["blk.7.ffn_gate_exps.weight", "blk.7.ffn_up_exps.weight"]


def changed(tmp_path: Path, types: Mapping[str, str | None]) -> Path:
    """gpt-oss's file with tensors of zeros in other types; None: without."""
    file = GgufFile.open(written(folder("gpt_oss"), tmp_path / "whole.gguf"))
    specs = [
        TensorSpec(t.name, TYPES[types.get(t.name) or t.type.name], t.shape)
        for t in file.tensors.values()
        if types.get(t.name, "") is not None
    ]
    with GgufWriter(tmp_path / "changed.gguf", file.metadata, specs) as writer:
        for spec in specs:
            same = spec.type == file.tensors[spec.name].type
            writer.write(spec.name, file.read(spec.name) if same else torch.zeros(spec.raw_shape, dtype=torch.uint8))
    return tmp_path / "changed.gguf"


@pytest.mark.parametrize(
    ("types", "message"),
    [
        ({"blk.1.ffn_up_exps.weight": None}, r"gate_up_proj is 2 tensors of a file, and blk\.1\.ffn_gate_exps\.weight"),
        ({"blk.0.ffn_up_exps.weight": "F16"}, r"ffn_up_exps.* in F16 and F32 are not one tensor"),
        ({"blk.0.ffn_gate_exps.weight": "Q8_0"}, r"gate_up_proj(\.weight)? is 2 tensors of a file"),
        ({"blk.0.ffn_gate_exps.weight": "Q8_0", "blk.0.ffn_up_exps.weight": "Q4_0"}, r"in Q4_0 and Q8_0 are not one"),
    ],
)
def test_shares_that_are_not_one_tensor_are_named(types: dict[str, str | None], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        GgufCheckpoint.open(changed(tmp_path, types))


@pytest.mark.parametrize("family", ["gpt_oss", "qwen2"])
def test_scales_that_llama_cpp_does_not_multiply_by_are_refused(family: str, tmp_path: Path) -> None:
    """NVFP4's, of the whole tensor: it reads them of every architecture, and of most computes without."""
    rules = ["**.mlp.*=skip"] if family == "qwen2" else []  # of 96 columns, which are no whole blocks
    spicerack.quantize(folder(family), "nvfp4", rules=rules, output=tmp_path / "q")
    with pytest.raises(SchemeError, match=r"and .* more layers: llama.cpp does not multiply by the scales of NVFP4"):
        export(tmp_path / "q", to="gguf", output=tmp_path / "m.gguf")
    with pytest.raises(UsageError, match=r"does not multiply by the scales(.|\n)*mxfp4"):
        spicerack.quantize(folder(family), "nvfp4", rules=rules, for_="llama.cpp", output=tmp_path / "again")
    assert not (tmp_path / "m.gguf").exists() and not (tmp_path / "again").exists()


def test_a_ramp_that_llama_cpp_truncates_is_told_and_comes_back(tmp_path: Path) -> None:
    """gpt-oss's own config says that it is not; a file says nothing of it, and other tools' files are gpt-oss's."""
    family, config = of_type("gpt_oss"), dict(Folder.open(folder("gpt_oss")).config)
    for truncate in (True, False):
        config["rope_parameters"] = {**config["rope_parameters"], "truncate": truncate}
        assert configs.obstacles(family, configs.whole(config)) == []
        assert len(configs.notes(family, configs.whole(config))) == (not truncate)
        place = tmp_path / str(truncate)
        shutil.copytree(folder("gpt_oss"), place)
        (place / "config.json").write_text(json.dumps(config))
        back = GgufCheckpoint.open(written(place, tmp_path / f"{truncate}.gguf")).config
        assert back["rope_parameters"].get("truncate", True) is truncate
    config["sliding_window"] = None
    assert "sliding_window" in configs.obstacles(family, configs.whole(config))[0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"no_rope_layers": [1, 0, 1, 1]}, "no_rope_layers are not every 4th"),
        ({"layer_types": ["full_attention"] * 4}, "layer_types are not those of its no_rope_layers"),
        ({"moe_layers": [0]}, "moe_layers are not those of interleave_moe_layer_step"),
        ({"use_qk_norm": False}, "use_qk_norm is False"),
        ({"moe_layers": []}, "it has no experts"),
        ({"attention_chunk_size": 16}, "attention_chunk_size 16"),
    ],
)
def test_llama_4_of_another_kind_is_refused(change: dict[str, Any], reason: str) -> None:
    config = dict(Folder.open(folder("llama4_text")).config) | change
    assert reason in configs.obstacles(of_type("llama4_text"), configs.whole(config))[0]


def test_a_stack_is_written_and_read_back_an_expert_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole one, its codes taken apart, is four times what a file has: none is ever asked for."""
    release, _ = released(tmp_path / "release")
    spicerack.quantize(folder("gpt_oss"), "w4g32", output=tmp_path / "q")
    for asked in ("packed", "undecoded"):
        own = getattr(Folder, asked)

        def matrices_only(self: Folder, stored: Any, own: Any = own) -> Any:
            assert len(stored.shape) == 2, f"{stored.module} is read as a whole"
            return own(self, stored)

        monkeypatch.setattr(Folder, asked, matrices_only)
    for number, source in enumerate((release, tmp_path / "q")):
        assert export(source, to="gguf", output=tmp_path / f"{number}.gguf").verified_by.startswith("gguf-py")


def test_a_code_of_one_expert_that_differs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spicerack.quantize(folder("gpt_oss"), "w4g32", output=tmp_path / "q")
    written_as = plans.blocks.encode

    def other(type_: Any, q: Any, name: str = "tensor") -> torch.Tensor:
        raw = written_as(type_, q, name)
        if name.endswith("layers.1.mlp.experts.down_proj"):
            raw[5, 7] ^= 1
        return raw

    monkeypatch.setattr(plans.blocks, "encode", other)
    with pytest.raises(OutputError, match=r"layers\.1\.mlp\.experts\.down_proj\.weight, expert 0: gguf-py"):
        export(tmp_path / "q", to="gguf", output=tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()
