"""The loop from folder to folder: nothing lost, nothing half-written, the same bytes after any interruption."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import processes
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import spicerack
from spicerack.errors import CheckpointError, OutputError, RecipeError, SchemeError, ShapeError, WeightError
from spicerack.numerics import codec
from spicerack.numerics.scheme import parse
from spicerack.storage.reader import Checkpoint

ALL_SCHEMES = ("w8", "w8a8", "w4g32", "w4g32z", "w3g64", "w2g32z", "w2g32h", "w5", "w8t", "nf4", "ternary")


def folder_hashes(folder: Path) -> dict[str, str]:
    """Contents of every file but run.json (times, memory, host, paths)."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "run.json")
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def ledger(folder: Path) -> dict[str, dict[str, object]]:
    return {entry["tensor"]: entry for entry in json.loads((folder / "spicerack.json").read_text())["tensors"]}


@pytest.mark.parametrize("scheme", ALL_SCHEMES)
def test_every_tensor_is_accounted_for(llama_folder, tmp_path: Path, scheme: str) -> None:
    model = llama_folder(dtype=torch.bfloat16)
    result = spicerack.quantize(model, scheme, output=tmp_path / "out")
    source = Checkpoint.open(model)
    entries = ledger(tmp_path / "out")
    assert entries.keys() == source.tensors.keys()
    written = Checkpoint.open(tmp_path / "out")
    assert sum(t.nbytes for t in written.tensors.values()) == result["bytes_after"]
    assert sum(e["bytes_after"] for e in entries.values()) == result["bytes_after"]
    assert sum(t.nbytes for t in source.tensors.values()) == result["bytes_before"]
    assert {e["scheme"] for n, e in entries.items() if "proj" in n} == {scheme}
    for name, entry in entries.items():
        if entry["action"] == "copy":
            assert torch.equal(written.read(name), source.read(name)), name
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes()


def test_bits_count_everything_that_is_stored(llama_folder, tmp_path: Path) -> None:
    result = spicerack.quantize(llama_folder(), "w4g32z", output=tmp_path / "out")
    assert result["bits_per_weight"] == 4 + (16 + 4) / 32
    entries = ledger(tmp_path / "out").values()
    parameters = sum(torch.Size(e["shape"]).numel() for e in entries)
    assert result["bits_per_weight_total"] == pytest.approx(8 * sum(e["bytes_after"] for e in entries) / parameters)


def test_the_ledger_states_the_true_error(llama_folder, tmp_path: Path) -> None:
    model = llama_folder()
    spicerack.quantize(model, "w3g64", output=tmp_path / "out")
    name = "model.layers.1.mlp.down_proj.weight"
    w = Checkpoint.open(model).read(name)
    error = (codec.decode(codec.encode(w, parse("w3g64"))) - w).norm() / w.norm()
    assert ledger(tmp_path / "out")[name]["error"] == pytest.approx(float(error), rel=1e-3)


def test_the_same_command_gives_the_same_bytes(llama_folder, tmp_path: Path) -> None:
    model = llama_folder()
    for name, threads in (("a", 1), ("b", 2)):
        spicerack.quantize(model, "w4g32", output=tmp_path / name, threads=threads, shard_bytes=40_000)
    assert folder_hashes(tmp_path / "a") == folder_hashes(tmp_path / "b")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 3


def test_sharded_and_single_sources_give_the_same_tensors(llama_folder, tmp_path: Path) -> None:
    single, sharded = llama_folder("single"), llama_folder("sharded", max_shard_size="100KB")
    assert len(Checkpoint.open(sharded).shards) > 2
    for name, model in (("a", single), ("b", sharded)):
        spicerack.quantize(model, "w4g32", output=tmp_path / name)
    a, b = load_file(tmp_path / "a" / "model.safetensors"), load_file(tmp_path / "b" / "model.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- interruptions ---------------------------------------------------------------------------------------------------

KILLED = textwrap.dedent(
    """
    import os, signal, sys
    from pathlib import Path
    from spicerack.storage import writer
    from spicerack.cli import main

    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs do not have
    model, output, moment, sent = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    seen = 0

    def counted(function):
        def wrapper(*args, **kwargs):
            global seen
            seen += 1
            if seen == moment:
                os.kill(os.getpid(), sent)
            return function(*args, **kwargs)
        return wrapper

    writer.ShardWriter.write = counted(writer.ShardWriter.write)
    writer.os.fsync = counted(writer.os.fsync)
    Path.replace = counted(Path.replace)
    Path.unlink = counted(Path.unlink)
    sys.argv = ["spicerack", "quantize", model, "-o", output, "--scheme", "w4g32", "--no-check", "--shard-size", "40KB"]
    try:
        main()
    finally:
        print(seen, file=sys.stderr)
    """
)


def run_killed(
    model: Path, output: Path, moment: int, sent: signal.Signals = signal.SIGKILL
) -> subprocess.CompletedProcess[str]:
    return processes.run(KILLED, [model, output, moment, int(sent)], output.parent)


@pytest.mark.slow
def test_kill_9_at_any_moment_and_resume_gives_the_same_bytes(llama_folder, tmp_path: Path) -> None:
    model = llama_folder(num_hidden_layers=1)
    whole = run_killed(model, tmp_path / "whole", 0)
    assert whole.returncode == 0, whole.stderr
    moments = int(whole.stderr.split()[-1])
    expected = folder_hashes(tmp_path / "whole")
    tail = [moments, moments - 1, moments - 3, moments - 6]  # index, ledger, config, the last rename
    for moment in [*tail, *random.Random(7).sample(range(1, moments - 6), 2)]:
        output = tmp_path / f"killed-{moment}"
        assert run_killed(model, output, moment).returncode == -signal.SIGKILL
        assert not output.exists() or folder_hashes(output) == expected
        if not output.exists():
            spicerack.quantize(model, "w4g32", output=output, shard_bytes=40_000)
        assert folder_hashes(output) == expected, moment


@pytest.mark.slow
def test_ctrl_c_leaves_a_folder_that_the_same_command_finishes(llama_folder, tmp_path: Path) -> None:
    model = llama_folder()
    stopped = run_killed(model, tmp_path / "out", 60, signal.SIGINT)
    assert stopped.returncode == 130 and "Traceback" not in stopped.stderr and "continues" in stopped.stderr
    assert not (tmp_path / "out").exists() and list((tmp_path / "out.partial").glob("*.safetensors"))
    for name in ("out", "whole"):
        assert run_killed(model, tmp_path / name, 0).returncode == 0
    assert folder_hashes(tmp_path / "out") == folder_hashes(tmp_path / "whole")


def test_an_interrupted_run_resumes_and_says_so(llama_folder, tmp_path: Path) -> None:
    model = llama_folder()

    def interrupt(nbytes: int) -> None:
        calls.append(nbytes)
        if len(calls) == 9:
            raise KeyboardInterrupt

    calls: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        spicerack.quantize(model, "w8", output=tmp_path / "out", shard_bytes=40_000, progress=interrupt)
    assert not (tmp_path / "out").exists() and list((tmp_path / "out.partial").glob("*.safetensors"))
    steps: list[int] = []
    result = spicerack.quantize(model, "w8", output=tmp_path / "out", shard_bytes=40_000, progress=steps.append)
    assert result["resumed"] and sum(steps) == result["bytes_before"]
    spicerack.quantize(model, "w8", output=tmp_path / "again", shard_bytes=40_000)
    assert folder_hashes(tmp_path / "out") == folder_hashes(tmp_path / "again")


def test_resuming_with_another_recipe_is_refused(llama_folder, tmp_path: Path) -> None:
    model = llama_folder()
    spicerack.quantize(model, "w8", output=tmp_path / "out")
    before = folder_hashes(tmp_path / "out")
    with pytest.raises(OutputError, match="another recipe"):
        spicerack.quantize(model, "w4g32", output=tmp_path / "out")
    assert folder_hashes(tmp_path / "out") == before


def test_the_same_call_again_finds_its_folder_there(llama_folder, tmp_path: Path) -> None:
    """A script that runs twice succeeds twice; what is not whole any more, or another's, is refused as ever."""
    model, out = llama_folder(), tmp_path / "out"
    first = spicerack.quantize(model, "w8", output=out)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    second = spicerack.quantize(model, "w8", output=out)
    assert not first["already_there"] and second["already_there"] and not second["resumed"]
    assert {key: first[key] for key in ("bytes_after", "notes", "format")} == {
        key: second[key] for key in ("bytes_after", "notes", "format")
    }
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before and not list(tmp_path.glob("*.partial"))
    for spoil in (
        lambda: (out / "generation_config.json").unlink(),
        lambda: os.truncate(out / "model.safetensors", 5000),
    ):
        spoil()
        with pytest.raises(OutputError, match="is from this command, but"):
            spicerack.quantize(model, "w8", output=out)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="not a folder that spicerack wrote"):
        spicerack.quantize(model, "w8", output=tmp_path / "file")


# ---- memory ----------------------------------------------------------------------------------------------------------

MEASURED = (
    "import sys, spicerack; print(spicerack.quantize(sys.argv[1], sys.argv[2], output=sys.argv[3])['peak_rss_bytes'])"
)


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "dtype"), [("w4g128", torch.bfloat16), ("w8", torch.float32)])
def test_peak_memory_is_three_tensors_whatever_the_size(tmp_path: Path, scheme: str, dtype: torch.dtype) -> None:
    """At most 0.6 GB, imports included, plus three times the largest tensor."""
    width, layers = 2048, 80 // dtype.itemsize
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    w = torch.randn(4 * width, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    names = [f"blocks.{i}.up_proj.weight" for i in range(layers)]  # of an architecture that nobody knows
    each = layers // 4
    for shard in range(0, layers, each):
        file = folder / f"model-{shard // each + 1:05d}-of-00004.safetensors"
        save_file({name: w.clone() for name in names[shard : shard + each]}, file, metadata={"format": "pt"})
    index = {n: f"model-{i // each + 1:05d}-of-00004.safetensors" for i, n in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert w.nbytes * layers > 1.3e9
    command = [sys.executable, "-c", MEASURED, str(folder), scheme, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 0.6e9 + 3 * w.nbytes


# ---- bad input -------------------------------------------------------------------------------------------------------


def replace_tensor(folder: Path, name: str, tensor: torch.Tensor) -> None:
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    save_file(tensors | {name: tensor}, path, metadata={"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named(llama_folder, tmp_path: Path, value: float) -> None:
    model = llama_folder()
    name = "model.layers.1.mlp.up_proj.weight"
    w = Checkpoint.open(model).read(name).clone()
    w[3, 5] = value
    replace_tensor(model, name, w)
    with pytest.raises(WeightError, match=rf"{name}.*\[3, 5\]"):
        spicerack.quantize(model, "w8", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_scale_that_underflows_is_refused(llama_folder, tmp_path: Path) -> None:
    model = llama_folder()
    name = "model.layers.0.mlp.up_proj.weight"
    replace_tensor(model, name, Checkpoint.open(model).read(name) * 1e-12)
    with pytest.raises(WeightError, match=f"{name}.*scale below"):
        spicerack.quantize(model, "w8", output=tmp_path / "out")


def test_an_indivisible_group_is_refused_before_work_with_all_its_tensors(llama_folder, tmp_path: Path) -> None:
    model = llama_folder(intermediate_size=176)
    with pytest.raises(ShapeError, match=r"^2 x .*down_proj: K=176 .*w4g64.*: w4g16 fits") as error:
        spicerack.quantize(model, "w4g64", output=tmp_path / "out")
    assert "--fit-groups" in error.value.hint and "--set 'model.layers.*.mlp.down_proj=w4g16'" in error.value.hint
    assert not list(tmp_path.glob("out*"))


def test_what_is_knowable_before_weights_are_read_is_refused_before(llama_folder, tmp_path: Path) -> None:
    model = llama_folder()
    out = tmp_path / "out"
    with pytest.raises(SchemeError, match="calibration"):
        spicerack.quantize(model, "w8a8s", output=out)
    with pytest.raises(RecipeError, match="matches nothing"):
        spicerack.quantize(model, "w8", output=out, rules=["model.layers.*.mlp.typo_proj=w4g32"])
    with pytest.raises(CheckpointError):
        spicerack.quantize(tmp_path / "nowhere", "w8", output=out)
    assert not list(tmp_path.glob("out*"))


def test_quantizing_twice_is_refused(llama_folder, tmp_path: Path) -> None:
    spicerack.quantize(llama_folder(), "w8", output=tmp_path / "a")
    with pytest.raises(CheckpointError, match="quantized already"):
        spicerack.quantize(tmp_path / "a", "w4g32", output=tmp_path / "b")


def test_tied_embeddings_are_one_tensor(llama_folder, tmp_path: Path) -> None:
    model = llama_folder(tie_word_embeddings=True)
    replace_tensor(model, "lm_head.weight", Checkpoint.open(model).read("model.embed_tokens.weight").clone())
    result = spicerack.quantize(model, "w8", output=tmp_path / "out", rules=["lm_head=w8"])
    entries = ledger(tmp_path / "out")
    assert entries["lm_head.weight"]["action"] == "drop" and entries["lm_head.weight"]["bytes_after"] == 0
    assert entries["model.embed_tokens.weight"]["scheme"] == "w8"
    assert not any(name.startswith("lm_head") for name in Checkpoint.open(tmp_path / "out").tensors)
    parameters = sum(torch.Size(e["shape"]).numel() for n, e in entries.items() if n != "lm_head.weight")
    assert result["bits_per_weight_total"] == pytest.approx(8 * result["bytes_after"] / parameters)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_an_output_error(llama_folder, tmp_path: Path) -> None:
    model = llama_folder()
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    with pytest.raises(OutputError):
        spicerack.quantize(model, "w8", output=locked / "out")
