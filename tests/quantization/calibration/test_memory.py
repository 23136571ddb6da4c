"""What is planned of memory: of a true 70B folder, from its headers; of runs that tell what they used; refusals."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import folders
import pytest
import torch
from calibrations import Watching, saved, text
from conftest import LlamaFolder
from transformers import LlamaConfig, LlamaForCausalLM

import spicerack
from spicerack.algorithms.method import parse as parse_method
from spicerack.errors import OutputError, UsageError
from spicerack.numerics.scheme import parse
from spicerack.quantization import memory
from spicerack.quantization.job import Job, prepare
from spicerack.quantization.recipe import Recipe, decided
from spicerack.quantization.run import execute

GB = 10**9


def job(folder: Path, scheme: str = "w4g128", method: str = "gptq") -> Job:
    return prepare(folder, decided(Recipe(parse(scheme), method=parse_method(method)), True))


@pytest.fixture(scope="module")
def llama_70b(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("70b")
    return job(folders.folder(folder / "m", folders.llama_shapes(folders.LLAMA_70B), folders.LLAMA_70B, shards=30))


def test_a_70b_model_is_planned_below_16_gb(llama_70b: Job) -> None:
    plan = memory.make(llama_70b, (128, 512))
    assert plan.peak_bytes < 16 * GB and "down_proj" in plan.where and plan.sequences >= 1
    assert plan.block_bytes == plan.peak_bytes - memory.PROCESS
    assert memory.make(llama_70b, None).block_bytes == 0


def test_less_memory_takes_smaller_chunks(tmp_path: Path) -> None:
    config = {**folders.LLAMA_70B, "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8}
    config["num_hidden_layers"] = 1
    given = job(folders.folder(tmp_path / "m", folders.llama_shapes(config), config), "w4g128")
    given = dataclasses.replace(given, actions=tuple(a for a in given.actions if "layers" in a.info.name))
    wide = memory.make(given, (128, 512))
    tight = memory.make(given, (128, 512), wide.peak_bytes - 1)
    assert tight.sequences < wide.sequences == 16 and tight.peak_bytes < wide.peak_bytes
    assert memory.make(given, (128, 512), 64 * GB) == wide


def test_transforms_that_move_factors_share_one_copy_of_a_block(tmp_path: Path) -> None:
    """Float32 whatever the model's type; rotated weights lie in memory besides, as they are stored: in bfloat16."""
    config = {**folders.LLAMA_70B, "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8}
    config["num_hidden_layers"] = 1
    folder = folders.folder(tmp_path / "m", folders.llama_shapes(config), config)
    peaks = {}
    for chain in ("gptq", "awq+gptq", "smoothquant+awq+gptq", "hadamard+awq+gptq"):
        given = job(folder, "w4g128", chain)
        block = tuple(a for a in given.actions if "layers" in a.info.name)  # the embedding is larger than all of it
        peaks[chain] = memory.make(dataclasses.replace(given, actions=block), (128, 512)).peak_bytes
    weights = sum(a.info.numel for a in block if a.stored is not None)
    assert peaks["awq+gptq"] - peaks["gptq"] == 4 * weights
    assert peaks["smoothquant+awq+gptq"] == peaks["awq+gptq"]
    assert peaks["hadamard+awq+gptq"] - peaks["awq+gptq"] == 2 * weights


def test_what_cannot_fit_is_refused_by_name(llama_70b: Job) -> None:
    with pytest.raises(UsageError, match=r"--memory 4 GB: at least 1\d\.\d GB are needed, while .*down_proj"):
        memory.make(llama_70b, (128, 512), 4 * GB)
    with pytest.raises(UsageError, match="writing the largest tensor"):
        memory.make(llama_70b, None, 4 * GB)


def test_other_chunks_do_not_continue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = saved("llama", tmp_path / "float")

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(job(source, "w4g16"), tmp_path / "out", calibration=text(), watch=Watching(finished=stop))
    monkeypatch.setattr(memory, "TOKENS", 4 * 24)
    with pytest.raises(OutputError, match="another calibration"):
        execute(job(source, "w4g16"), tmp_path / "out", calibration=text())


_RUN = """
import json, pathlib, sys, torch
import spicerack
from spicerack.algorithms.solvers import blockap
from spicerack.algorithms.transforms import awq
from spicerack.text.calibration import Calibration
from spicerack.quantization.job import prepare
from spicerack.algorithms.method import parse as chain
from spicerack.quantization.recipe import decided
from spicerack.quantization.run import execute
from spicerack.quantization.stream import Means, plan
from spicerack.quantization.recipe import Recipe
from spicerack.numerics.scheme import parse
source, out, scheme, method = sys.argv[1:]
blockap.STEPS = 3  # what more of them need is time
awq.EXPONENTS = (0.2, 0.6)
ids = torch.randint(3, 99, (4, 256), generator=torch.Generator().manual_seed(0))
given = Calibration(ids, None, "of no text", 0.0, "made up")
job = prepare(source, decided(Recipe(parse(scheme), method=chain(method)), True))
result = execute(job, pathlib.Path(out), calibration=given, means=Means(threads=1))
print(json.dumps(result.as_dict()))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "method"),
    [("w4g128", "gptq"), ("w4g32z", "awq+gptq"), ("w2g32z", "blockap")],
)
def test_the_plan_is_kept(scheme: str, method: str, tmp_path: Path) -> None:
    """By a process whose memory is that of its weights and statistics more than the interpreter's."""
    config = LlamaConfig(
        hidden_size=512, intermediate_size=4096, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=8,
        vocab_size=99, max_position_embeddings=256, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    if method != "gptq":
        config.intermediate_size = 1024
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "m")
    command = [sys.executable, "-c", _RUN, str(tmp_path / "m"), str(tmp_path / "out"), scheme, method]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["peak_rss_bytes"] < result["planned_peak_bytes"]
    mapped = sum(path.stat().st_size for path in (tmp_path / "m").glob("*.safetensors"))
    assert result["planned_peak_bytes"] < 2.2 * (result["peak_rss_bytes"] - mapped)  # and not by planning anything


def test_data_free_runs_are_planned_too(llama_folder: LlamaFolder, tmp_path: Path) -> None:
    folder = llama_folder()
    result = spicerack.quantize(folder, "w4g32", output=tmp_path / "out", memory=2 * GB)
    assert result["peak_rss_bytes"] and result["planned_peak_bytes"] < 2 * GB
    with pytest.raises(UsageError, match="--memory"):
        spicerack.quantize(folder, "w4g32", output=tmp_path / "again", memory=1000)
    assert not (tmp_path / "again").exists()
