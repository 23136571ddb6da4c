"""The reader against folders that are right, broken and hostile; safetensors' own library is the oracle."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import folders
import pytest
import torch
from safetensors.torch import load_file, save_file

from spicerack.errors import CheckpointError
from spicerack.storage import files
from spicerack.storage.reader import Checkpoint

TENSORS = {
    "model.embed_tokens.weight": torch.arange(48, dtype=torch.float32).reshape(12, 4),
    "model.layers.0.mlp.up_proj.weight": torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "model.layers.0.mlp.up_proj.bias": torch.tensor([1.5, -2.0]).half(),
    "model.step": torch.tensor(7, dtype=torch.int64),
}


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """One model.safetensors with four types, and side files in a sub-folder."""
    folder = tmp_path / "single"
    (folder / "1_Pooling").mkdir(parents=True)
    save_file(TENSORS, folder / "model.safetensors")
    for name in ("config.json", "tokenizer.json", "1_Pooling/config.json"):
        (folder / name).write_text("{}" if name != "config.json" else '{"model_type": "llama"}')
    (folder / "modeling_own.py").write_text("raise SystemExit('a stranger ran')")
    return folder


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The same tensors in two shards with an index."""
    folder = tmp_path / "sharded"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    names = list(TENSORS)
    parts = {"model-00001-of-00002.safetensors": names[:2], "model-00002-of-00002.safetensors": names[2:]}
    for shard, part in parts.items():
        save_file({name: TENSORS[name] for name in part}, folder / shard)
    write_index(folder, {name: shard for shard, part in parts.items() for name in part})
    return folder


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / files.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def index_of(folder: Path) -> dict[str, str]:
    weight_map = json.loads((folder / files.INDEX).read_text())["weight_map"]
    assert isinstance(weight_map, dict)
    return weight_map


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_reads_what_safetensors_reads(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    checkpoint = Checkpoint.open(folder)
    expected = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert set(checkpoint.tensors) == set(expected)
    for name, tensor in expected.items():
        info, read = checkpoint.tensors[name], checkpoint.read(name)
        assert read.dtype == tensor.dtype and torch.equal(read, tensor)
        assert (info.shape, info.nbytes, info.numel) == (tuple(tensor.shape), tensor.nbytes, tensor.numel())
    assert torch.equal(
        checkpoint.read_rows("model.embed_tokens.weight", 3, 7), TENSORS["model.embed_tokens.weight"][3:7]
    )


def test_order_is_that_of_the_bytes(tmp_path: Path) -> None:
    shapes = {"z": (4, 2), "a": (2, 2), "m": (1,)}
    folder = folders.folder(tmp_path / "m", shapes, {}, dtype="F32")
    assert list(Checkpoint.open(folder).tensors) == ["z", "a", "m"]


def test_side_files(single: Path) -> None:
    (single / ".git").mkdir()
    for name in (".git/config", ".gitattributes", "spicerack.json", "run.json", "x.tmp", "pytorch_model.bin", "m.gguf"):
        (single / name).write_text("{}")
    (single / "onnx").mkdir()
    (single / "onnx" / "model.onnx").write_text("")
    (single / "2_Dense").mkdir()
    (single / "2_Dense" / "model.safetensors").write_text("")
    (single / "modules.json").write_text('[{"path": ""}, {"path": "2_Dense"}]')
    checkpoint = Checkpoint.open(single)
    side = ["modeling_own.py", "modules.json", "tokenizer.json", "1_Pooling/config.json", "2_Dense/model.safetensors"]
    assert list(checkpoint.side_files) == side
    assert [note.split()[0] for note in checkpoint.notes] == ["m.gguf", "pytorch_model.bin", "onnx/model.onnx"]


def test_every_type_has_its_size(single: Path) -> None:
    types = [torch.float64, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.int16]
    tensors = {str(dtype): torch.zeros(3, 5, dtype=dtype) for dtype in [*types, torch.int32, torch.complex64]}
    save_file(tensors, single / "model.safetensors")
    infos = Checkpoint.open(single).tensors
    assert {name: info.nbytes for name, info in infos.items()} == {n: t.nbytes for n, t in tensors.items()}


def test_odd_single_name(single: Path) -> None:
    (single / "model.safetensors").rename(single / "weights.safetensors")
    assert Checkpoint.open(single).shards == ("weights.safetensors",)


def test_quantized_folders_open(single: Path) -> None:
    (single / "config.json").write_text('{"quantization_config": {"quant_method": "compressed-tensors"}}')
    assert "quantization_config" in Checkpoint.open(single).config


def test_tensors_that_the_index_forgets_are_kept(sharded: Path) -> None:
    weight_map = index_of(sharded)
    del weight_map["model.step"]
    write_index(sharded, weight_map)
    checkpoint = Checkpoint.open(sharded)
    assert "model.step" in checkpoint.tensors and "model.step" in checkpoint.notes[0]


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def config_is_a_list(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def config_is_deep(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 200_000)


def config_has_a_huge_number(folder: Path) -> None:
    (folder / "config.json").write_text('{"a": ' + "9" * 10_000 + "}")


def config_asks_for_a_billion_labels(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"text_config": {"num_labels": 10**9}}))


def config_is_huge(folder: Path) -> None:
    with (folder / "config.json").open("r+b") as file:
        file.truncate(files.MAX_CONFIG_BYTES + 1)


def config_is_a_pipe(folder: Path) -> None:
    no_config(folder)
    os.mkfifo(folder / "config.json")


def shard_is_missing(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()


def shard_is_truncated(folder: Path) -> None:
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-3])


def shard_is_empty(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"")


def header_is_too_large(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").write_bytes((2**40).to_bytes(8, "little") + b"{}")


def index_names_what_is_not_there(folder: Path) -> None:
    write_index(folder, {**index_of(folder), "model.norm.weight": "model-00001-of-00002.safetensors"})


def index_names_the_wrong_shard(folder: Path) -> None:
    write_index(folder, {**index_of(folder), "model.step": "model-00001-of-00002.safetensors"})


def index_climbs_out(folder: Path) -> None:
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder.parent / "x.safetensors")
    write_index(folder, {**index_of(folder), "model.step": "../x.safetensors"})


def index_is_absolute(folder: Path) -> None:
    write_index(folder, {**index_of(folder), "model.step": str(folder / "model-00002-of-00002.safetensors")})


def index_holds_a_number(folder: Path) -> None:
    (folder / files.INDEX).write_text('{"weight_map": {"model.step": 7}}')


def index_is_empty(folder: Path) -> None:
    (folder / files.INDEX).write_text('{"weight_map": {}}')


def tensor_is_in_two_shards(folder: Path) -> None:
    save_file(
        {"model.step": TENSORS["model.step"], **dict(list(TENSORS.items())[:2])},
        folder / "model-00001-of-00002.safetensors",
    )


def name_is_unprintable(folder: Path) -> None:
    save_file({"a\x1b[2Jb": TENSORS["model.step"]}, folder / "model-00001-of-00002.safetensors")


def no_index(folder: Path) -> None:
    (folder / files.INDEX).unlink()


def pickled(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")


def gguf(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "model-Q4_K.gguf").write_bytes(b"GGUF")


def adapter(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    save_file(TENSORS, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")


def nothing(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()


def no_tensors(folder: Path) -> None:
    nothing(folder)
    save_file({}, folder / "model.safetensors")


def side_file_leaves(folder: Path) -> None:
    (folder.parent / "id_rsa").write_text("secret")
    (folder / "tokenizer.json").symlink_to(folder.parent / "id_rsa")


def sub_folder_leaves(folder: Path) -> None:
    (folder / "1_Pooling").symlink_to(folder.parent)


BROKEN: list[tuple[Callable[[Path], None], str]] = [
    (no_config, "config.json is missing"),
    (config_is_a_list, "a JSON list, not an object"),
    (config_is_deep, "config.json is not valid JSON"),
    (config_has_a_huge_number, "config.json is not valid JSON"),
    (config_asks_for_a_billion_labels, "num_labels is 1000000000"),
    (config_is_huge, "config.json has 16777217 bytes"),
    (config_is_a_pipe, "config.json is missing"),
    (shard_is_missing, "model-00002-of-00002.safetensors is missing"),
    (shard_is_truncated, "model-00002-of-00002.safetensors cannot be read"),
    (shard_is_empty, "model-00002-of-00002.safetensors cannot be read"),
    (header_is_too_large, "model-00002-of-00002.safetensors cannot be read: .*header too large"),
    (index_names_what_is_not_there, "'model.norm.weight', which is not in its shard model-00001"),
    (index_names_the_wrong_shard, "'model.step' is in model-00001-of-00002.safetensors, it is in model-00002"),
    (index_climbs_out, r"'\.\./x.safetensors', which is not"),
    (index_is_absolute, "'model.step' is said to be in '/"),
    (index_holds_a_number, "said to be in 7"),
    (index_is_empty, "has no weight_map"),
    (tensor_is_in_two_shards, "model.step is in both model-00001-of-00002.safetensors and model-00002"),
    (name_is_unprintable, "not printable"),
    (no_index, "2 safetensors files and no model.safetensors.index.json"),
    (pickled, "pickled files can execute code.*save_pretrained"),
    (gguf, "is a GGUF folder"),
    (adapter, "is an adapter"),
    (nothing, r"has no \*.safetensors file"),
    (no_tensors, "holds no tensors"),
    (side_file_leaves, "tokenizer.json is a link to .*id_rsa, outside the model folder"),
    (sub_folder_leaves, "1_Pooling is a link to a folder"),
]


@pytest.mark.parametrize(("damage", "message"), BROKEN, ids=lambda x: x.__name__ if callable(x) else "")
def test_broken_folders_are_refused_by_name(sharded: Path, damage: Callable[[Path], None], message: str) -> None:
    Checkpoint.open(sharded)
    damage(sharded)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(sharded)
    assert caught.value.hint and caught.value.exit_code == 2
    assert str(sharded) in caught.value.message  # the file or folder is named


def test_paths_that_are_not_folders(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    (tmp_path / "m.txt").write_bytes(b"")
    for path, message in (
        (tmp_path / "no", "does not exist"),
        (tmp_path / "m.gguf", "is a GGUF file"),
        (tmp_path / "m.txt", "not a model folder"),
    ):
        with pytest.raises(CheckpointError, match=message):
            Checkpoint.open(path)


def test_hub_id_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without network and cache a hub id is an error of ours; with a cached snapshot it is a folder."""
    code = "import sys; from spicerack.storage.reader import Checkpoint; print(Checkpoint.open('org/name').folder)"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "CheckpointError: org/name is not a local folder, and the hub gave nothing" in done.stderr
    cached_model(tmp_path)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith("models--org--name/snapshots/abc"), done.stderr


def cached_model(cache: Path) -> Path:
    """The layout of the Hugging Face cache: snapshots of links into blobs."""
    repository = cache / "models--org--name"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    for path in (snapshot, blobs, repository / "refs"):
        path.mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    save_file(TENSORS, blobs / "1")
    (blobs / "2").write_text("{}")
    for name, blob in (("model.safetensors", "1"), ("config.json", "2"), ("tokenizer.json", "2")):
        (snapshot / name).symlink_to(Path("../../blobs") / blob)
    return snapshot


def test_cache_layout(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(cached_model(tmp_path))
    assert checkpoint.side_files == ("tokenizer.json",)
    assert torch.equal(checkpoint.read("model.step"), TENSORS["model.step"])


def test_weights_may_be_links_elsewhere(single: Path, tmp_path: Path) -> None:
    (single / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (single / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    assert len(Checkpoint.open(single).tensors) == len(TENSORS)


def test_damage_after_opening(single: Path) -> None:
    checkpoint = Checkpoint.open(single)
    (single / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model.safetensors: model.step cannot be read"):
        checkpoint.read("model.step")
    with pytest.raises(CheckpointError, match=r"model.safetensors: model.step cannot be read"):
        checkpoint.read_rows("model.step", 0, 1)


def test_fingerprint_sees_every_part(tmp_path: Path) -> None:
    folder = folders.folder(tmp_path / "m", {"a": (512, 512), "b": (3,)}, {"x": 1}, dtype="F32")
    path = folder / "model.safetensors"
    original = path.read_bytes()
    fingerprints = {Checkpoint.open(folder).fingerprint()}
    assert Checkpoint.open(folder).fingerprint() in fingerprints
    start = 8 + int.from_bytes(original[:8], "little")
    eighth = start + (len(original) - 4096 - start) * 7 // 15
    for position in (start, start + 4095, eighth, eighth + 4095, len(original) - 1):  # edges of samples
        path.write_bytes(original[:position] + b"\x01" + original[position + 1 :])
        fingerprints.add(Checkpoint.open(folder).fingerprint())
    path.write_bytes(original.replace(b'"b"', b'"c"'))
    fingerprints.add(Checkpoint.open(folder).fingerprint())
    path.write_bytes(original)
    (folder / "config.json").write_text('{"x": 2}')
    fingerprints.add(Checkpoint.open(folder).fingerprint())
    assert len(fingerprints) == 8  # every change gave another fingerprint


def test_headers_alone_and_quickly(tmp_path: Path) -> None:
    """A 70B folder of 30 shards, and a mixture of 61,000 expert tensors, in bounded CPU time and without torch."""
    big = folders.folder(tmp_path / "70b", folders.llama_shapes(folders.LLAMA_70B), folders.LLAMA_70B, shards=30)
    start = time.process_time()
    checkpoint = Checkpoint.open(big)
    assert len(checkpoint.tensors) == 723 and time.process_time() - start < 1
    assert sum(info.nbytes for info in checkpoint.tensors.values()) == 2 * 70_553_706_496
    checkpoint.fingerprint()
    moe = folders.folder(tmp_path / "moe", folders.mixtral_shapes(80, 256), {"num_experts": 256}, shards=60)
    start = time.process_time()
    assert len(Checkpoint.open(moe).tensors) == 80 * (1 + 3 * 256) and time.process_time() - start < 5


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_held_shards_are_read_alike_and_opened_once(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(request.getfixturevalue(kind))
    expected = {name: checkpoint.read(name).clone() for name in checkpoint.tensors}
    mapped: list[int] = []
    real = mmap.mmap
    monkeypatch.setattr("mmap.mmap", lambda *args, **options: mapped.append(1) or real(*args, **options))
    held = checkpoint.held()
    monkeypatch.setattr("spicerack.storage.reader.safe_open", None)
    for _ in range(2):  # what was let go is read again
        for name, tensor in expected.items():
            read = held.read(name)
            assert read.dtype == tensor.dtype and torch.equal(read, tensor)
            held.release(name)
            assert torch.equal(read, tensor)
    assert len(mapped) == len(checkpoint.shards)


def test_held_tensors_of_any_place_and_size(tmp_path: Path) -> None:
    """Behind three bytes a float32 is not aligned; a tensor without numbers has no place at all."""
    tensors = {"bytes": torch.arange(3, dtype=torch.uint8), "none": torch.empty(0, 4), "one": torch.tensor(2.5)}
    head = {name: {"dtype": "F32", "shape": list(t.shape)} for name, t in tensors.items()}
    for name, begin, end in (("bytes", 0, 3), ("none", 3, 3), ("one", 3, 7)):
        head[name]["data_offsets"] = [begin, end]
    head["bytes"]["dtype"] = "U8"
    text = json.dumps(head).encode()
    data = b"".join(t.numpy().tobytes() for t in tensors.values())
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    (tmp_path / "config.json").write_text("{}")
    held = Checkpoint.open(tmp_path).held()
    for name, tensor in tensors.items():
        assert torch.equal(held.read(name), tensor) and held.read(name).shape == tensor.shape


def test_a_shard_that_shrinks_behind_its_header(single: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(single, tmp_path / "copy"))
    held = Checkpoint.open(folder).held()
    last = list(held.tensors)[-1]
    os.truncate(folder / files.SINGLE, held.tensors[last].begin)
    with pytest.raises(CheckpointError, match="its header promised"):
        held.read(last)


@pytest.mark.slow
@pytest.mark.parametrize("held", [False, True])
def test_one_tensor_in_memory(tmp_path: Path, held: bool) -> None:
    """Reading 512 MB tensor by tensor adds the memory of a few tensors, not of the file."""
    folder = folders.folder(tmp_path / "m", {f"t{i}": (4096, 1024) for i in range(32)}, {}, dtype="F32")
    code = f"""
import resource
from spicerack.storage.reader import Checkpoint
checkpoint = Checkpoint.open({str(folder)!r})
checkpoint = checkpoint.held() if {held} else checkpoint
checkpoint.read_rows("t0", 0, 1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in checkpoint.tensors:
    checkpoint.read(name).sum()
    checkpoint.release(name)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 4 * 16, "MiB"


def test_importing_and_opening_load_no_torch(single: Path) -> None:
    code = f"import sys; from spicerack.storage.reader import Checkpoint; Checkpoint.open({str(single)!r})"
    subprocess.run([sys.executable, "-c", code + "; assert 'torch' not in sys.modules"], check=True)
