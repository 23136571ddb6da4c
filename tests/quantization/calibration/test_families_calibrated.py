"""Families whose blocks are not as most are, calibrated: what the loop computed is what the folder computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest
import torch
import transformers
from calibrations import Watching, text

import spicerack
from spicerack.errors import UsageError
from spicerack.models.blocks.find import repeated
from spicerack.models.blocks.look import output_of
from spicerack.quantization.calibration.states import States, blocks_folder
from spicerack.quantization.job import prepare
from spicerack.quantization.recipe import decided, of
from spicerack.quantization.run import execute
from spicerack.runtime.load import load

FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "shared keys": (
        "Gemma4TextConfig",
        {**families.LLAMA, "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
         "sliding_window": 8, "num_kv_shared_layers": 2, "global_head_dim": 16, "hidden_size_per_layer_input": 8,
         "vocab_size_per_layer_input": 99},
        "Gemma4ForCausalLM",
    ),
    "biases handed on": ("T5Config", families.T5, "T5EncoderModel"),
    # its code multiplies with the weight of a layer that it never calls
    "weights that are read": (
        "MambaConfig",
        {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 99, "state_size": 8, "time_step_rank": 16},
        "MambaForCausalLM",
    ),
    "lists": ("OpenAIGPTConfig", families.GPT, "OpenAIGPTLMHeadModel"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_the_folder_computes_what_the_loop_did(name: str, tmp_path: Path) -> None:
    config, settings, model = FAMILIES[name]
    torch.manual_seed(0)
    built = getattr(transformers, model)(getattr(transformers, config)(**settings))
    built.to(torch.bfloat16 if name == "weights that are read" else torch.float32).save_pretrained(tmp_path / "model")
    out, given = tmp_path / "out", text(padded=name == "biases handed on")
    # what is in front of the blocks is rounded to nearest, which the loop does not see
    rules = ["**.per_layer_model_projection=skip"] if name == "shared keys" else []
    job = prepare(tmp_path / "model", decided(of("w4", rules).with_choices(None, "gptq", None), True))
    last: list[torch.Tensor] = []
    errors: list[float] = []

    def finished(block: Any) -> None:
        errors.append(block.error)
        if block.number == block.count - 1:
            last.append(States(blocks_folder(out), 1).read(block.count, 0)[0])

    execute(job, out, calibration=given, watch=Watching(finished=finished))
    loaded = load(out, compute="float", dtype=torch.float32)
    path, stack = repeated(load(tmp_path / "model"))
    rows = len(last[0])
    inputs = {"input_ids": given.ids[:rows]}
    real = torch.ones(rows, given.ids.shape[1], dtype=torch.bool)
    if given.mask is not None:
        inputs["attention_mask"], real = given.mask[:rows].long(), given.mask[:rows]
    expected = output_of(loaded, f"{path}.{len(stack) - 1}", inputs)
    computed = last[0][..., : expected.shape[-1]]
    assert float((computed - expected)[real].norm() / expected[real].norm()) < 1e-5
    assert 0 < max(errors) < 0.5


def test_what_cannot_be_calibrated_is_refused_before_work(tmp_path: Path) -> None:
    families.build("t5").save_pretrained(tmp_path / "t5")
    with pytest.raises(UsageError, match="encoder-decoder"):
        spicerack.quantize(tmp_path / "t5", "w8", output=tmp_path / "out", method="gptq", calibration=text())
    families.build("vit").save_pretrained(tmp_path / "vit")
    with pytest.raises(UsageError, match="reads pictures, not text"):
        spicerack.quantize(tmp_path / "vit", "w8", output=tmp_path / "out", method="gptq", calibration=text())
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
