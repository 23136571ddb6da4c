"""The writer: what it writes is read by safetensors, and nothing is ever half there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from spicerack.errors import OutputError
from spicerack.numerics.dtypes import safetensors_dtype
from spicerack.storage import writer as module
from spicerack.storage.files import CONFIG, INDEX
from spicerack.storage.ledger import Entry
from spicerack.storage.writer import OutputTensor, Shard, Unit, Writer, shards_of

IDENTITY = {"recipe": {"scheme": "w8"}, "source": "abc"}
TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.arange(7, dtype=torch.int8),
    "c": torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "d": torch.zeros(0, 3),
    "e": torch.tensor(3.5, dtype=torch.float16),
    "f": torch.tensor([True, False]),
    "g": torch.randn(5, generator=torch.Generator().manual_seed(1)).to(torch.float8_e4m3fn),
    "h": torch.arange(9).reshape(3, 3).t(),
}


def unit(name: str) -> Unit:
    tensor = TENSORS[name]
    return Unit(name, (OutputTensor(name, safetensors_dtype(tensor.dtype), tuple(tensor.shape)),))


def write(writer: Writer, shard: Shard) -> None:
    with writer.shard(shard) as out:
        for u in shard.units:
            for tensor in u.tensors:
                out.write(tensor.name, TENSORS[tensor.name])
            dtype, shape = u.tensors[0].dtype, u.tensors[0].shape
            out.entries.append(Entry(u.source, "copy", "", "", None, dtype, shape, 0, u.nbytes))


def test_safetensors_reads_what_is_written(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "out", shards_of([unit(n) for n in TENSORS], shard_bytes=60), IDENTITY)
    for shard in writer.pending():
        write(writer, shard)
    assert [entry.tensor for entry in writer.entries()] == list(TENSORS)
    writer.finish({CONFIG: b"{}"}, tmp_path, [])
    writer.seal()
    assert not writer.partial.exists()
    files = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert INDEX in files and CONFIG in files and len(files) == len(writer.shards) + 2
    read_back = {}
    for shard in writer.shards:
        with safe_open(tmp_path / "out" / shard.file, "pt") as file:
            read_back.update({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
    assert read_back.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read_back[name].dtype == tensor.dtype and read_back[name].shape == tensor.shape
        assert torch.equal(
            read_back[name].contiguous().view(-1).view(torch.uint8), tensor.contiguous().view(-1).view(torch.uint8)
        )


def test_units_are_not_split_and_shards_are_filled_in_order() -> None:
    pairs = [(OutputTensor(f"{i}.x", "F32", (10,)), OutputTensor(f"{i}.y", "U8", (10,))) for i in range(5)]
    units = [Unit(str(i), pair) for i, pair in enumerate(pairs)]
    shards = shards_of(units, shard_bytes=120)
    assert [[u.source for u in s.units] for s in shards] == [["0", "1"], ["2", "3"], ["4"]]
    assert [s.file for s in shards] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert shards_of(units)[0].file == "model.safetensors"
    assert len(shards_of([Unit("big", (OutputTensor("big", "F32", (1000,)),))], shard_bytes=8)) == 1


def test_what_was_promised_is_binding(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "out", shards_of([unit("a"), unit("b")]), IDENTITY)
    with pytest.raises(AssertionError, match="promised"), writer.shard(writer.shards[0]) as out:
        out.write("a", TENSORS["a"].half())
    with pytest.raises(AssertionError, match="not written"), writer.shard(writer.shards[0]) as out:
        out.write("a", TENSORS["a"])
    assert list(writer.pending()) == list(writer.shards)


def test_finished_shards_survive_and_leftovers_are_cleared(tmp_path: Path) -> None:
    shards = shards_of([unit(n) for n in "abc"], shard_bytes=10)
    first = Writer(tmp_path / "out", shards, IDENTITY)
    write(first, first.shards[0])
    (first.partial / (shards[1].file + ".tmp")).write_bytes(b"half")
    again = Writer(tmp_path / "out", shards, IDENTITY)
    assert again.resumed and list(again.pending()) == list(shards[1:])
    assert not list(again.partial.glob("*.tmp"))
    assert not (tmp_path / "out").exists()


def test_a_run_killed_before_the_last_rename_is_sealed(tmp_path: Path) -> None:
    shards = shards_of([unit("a")])
    first = Writer(tmp_path / "out", shards, IDENTITY)
    write(first, shards[0])
    first.finish(
        {module.LEDGER: b'{"identity": {"recipe": {"scheme": "w8"}, "source": "abc"}}', CONFIG: b"{}"}, tmp_path, []
    )
    (first.partial / "progress.json").unlink()
    again = Writer(tmp_path / "out", shards, IDENTITY)
    assert again.complete
    again.seal()
    assert (tmp_path / "out" / CONFIG).exists()


@pytest.mark.parametrize(
    "changed", [{"recipe": {"scheme": "w4"}, "source": "abc"}, {"recipe": {"scheme": "w8"}, "source": "xyz"}]
)
def test_another_recipe_or_model_is_refused_by_name(tmp_path: Path, changed: dict[str, object]) -> None:
    shards = shards_of([unit("a")])
    write(Writer(tmp_path / "out", shards, IDENTITY), shards[0])
    key = next(k for k in changed if changed[k] != IDENTITY[k])
    with pytest.raises(OutputError, match=f"another {key}"):
        Writer(tmp_path / "out", shards, changed)


def test_foreign_folders_are_left_alone(tmp_path: Path) -> None:
    for name in ("out", "other.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious.txt").write_text("mine")
    for name in ("out", "other"):
        with pytest.raises(OutputError):
            Writer(tmp_path / name, shards_of([unit("a")]), IDENTITY)
    assert (tmp_path / "out" / "precious.txt").read_text() == "mine"
    assert (tmp_path / "other.partial" / "precious.txt").read_text() == "mine"


def test_a_disk_that_is_too_small_is_found_before_work(tmp_path: Path) -> None:
    huge = [Unit("x", (OutputTensor("x", "F32", (1 << 50,)),))]
    with pytest.raises(OutputError, match="GB free"):
        Writer(tmp_path / "out", shards_of(huge), IDENTITY)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_is_reported_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = shards_of([unit("a"), unit("c")], shard_bytes=10)
    writer = Writer(tmp_path / "out", shards, IDENTITY)
    write(writer, shards[0])

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OutputError, match="No space left"):
        patch.setattr(module.os, "fsync", full)
        write(writer, shards[1])
    assert list(Writer(tmp_path / "out", shards, IDENTITY).pending()) == [shards[1]]


@pytest.mark.slow
def test_two_processes_do_not_write_one_folder(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from spicerack.storage.writer import Writer, shards_of\n"
        "writer = Writer(Path(sys.argv[1]), shards_of([]), {'recipe': {'scheme': 'w8'}, 'source': 'abc'})\n"
        "print('begun', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "begun\n"
        with pytest.raises(OutputError, match=f"being written by process {other.pid}"):
            Writer(tmp_path / "out", shards_of([]), IDENTITY)
        other.kill()
    Writer(tmp_path / "out", shards_of([]), IDENTITY)
    Writer(tmp_path / "out", shards_of([]), IDENTITY)  # the same process may begin again


@pytest.mark.parametrize(("place", "reason"), [
    ("", "no name"),
    ("/", "no name"),
    ("~nobody_at_all/out", "there is no user ~nobody_at_all"),
    ("file/out", "file is a file"),
    ("file/deep/out", "file is a file"),
    ("link", "a link to nothing"),
    ("x" * 300, "name too long"),
    ("x" * 250, "name too long"),  # of its .partial
    ("a\0b", "zero byte"),
])  # fmt: skip
def test_where_no_folder_can_be_made_is_said_before_anything_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("link").symlink_to("nothing")
    with pytest.raises(OutputError, match=rf"(?i)no folder can be made at .*: .*{reason}"):
        Writer(Path(place), shards_of([unit("a")]), IDENTITY)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "link"]
