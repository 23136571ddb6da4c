"""GGUF files: what is written, other readers read; what strangers write is read to the byte, or refused by name."""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from spicerack.errors import CheckpointError, OutputError, SpicerackError
from spicerack.storage.gguf import header
from spicerack.storage.gguf.ggml import TYPES, TensorSpec
from spicerack.storage.gguf.metadata import KINDS, Array, Entry, Metadata, Value, encoded
from spicerack.storage.gguf.reader import GgufFile
from spicerack.storage.gguf.writer import GgufWriter, header_bytes

METADATA: dict[str, Entry] = {
    "general.architecture": Value("string", "llama"),
    "llama.block_count": Value("u32", 3),
    "llama.eps": Value("f32", 1e-6),
    "wide": Value("u64", 2**63 + 1),
    "low": Value("i64", -(2**63)),
    "exact": Value("f64", 0.1),
    "yes": Value("bool", True),
    "small": Value("u8", 255),
    "signed": Value("i8", -128),
    "short": Value("i16", -5),
    "tokenizer.ggml.tokens": Array.of("string", ["<s>", "é", "", "▁the", "x" * 300]),
    "tokenizer.ggml.scores": Array.of("f32", [0.0, -1.5, 2.0]),
    "tokenizer.ggml.token_type": Array.of("i32", [1, 2, 3]),
    "flags": Array.of("bool", [True, False]),
    "nothing": Array.of("string", []),
}
SPECS = [
    TensorSpec("token_embd.weight", TYPES["Q8_0"], (5, 64)),
    TensorSpec("norm.weight", TYPES["F32"], (7,)),
    TensorSpec("experts.weight", TYPES["Q4_K"], (2, 3, 256)),
    TensorSpec("half.weight", TYPES["F16"], (3, 2, 2, 5)),
]


def rows(spec: TensorSpec) -> torch.Tensor:
    seed = sum(spec.name.encode())
    return torch.randint(256, spec.raw_shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def written(path: Path, specs: list[TensorSpec] = SPECS, **options: object) -> Path:
    with GgufWriter(path, METADATA, specs, **options) as writer:  # type: ignore[arg-type]
        for spec in specs:
            writer.write(spec.name, rows(spec))
    return writer.paths[0]


# ---- both ways -------------------------------------------------------------------------------------------------------


def test_gguf_py_reads_what_is_written(tmp_path: Path) -> None:
    theirs = gguf.GGUFReader(written(tmp_path / "m.gguf"))
    assert [tensor.name for tensor in theirs.tensors] == [spec.name for spec in SPECS]
    for tensor, spec in zip(theirs.tensors, SPECS, strict=True):
        assert tensor.tensor_type == spec.type.id and tensor.shape.tolist() == list(spec.shape[::-1])
        assert tensor.data.tobytes() == rows(spec).numpy().tobytes()
    for key, entry in METADATA.items():
        value = theirs.fields[key].contents()
        assert (value == list(entry)) if isinstance(entry, Array) else (value == pytest.approx(entry.value)), key


def test_what_gguf_py_writes_is_read_and_written_again_to_the_byte(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "llama")
    writer.add_custom_alignment(64)
    writer.add_block_count(2)
    writer.add_token_list(["a", "b", "ü"])
    writer.add_token_scores([0.5, 1.5, 2.5])
    writer.add_bool("flag", False)
    tensors = {"a": np.arange(10, dtype=np.float32), "b.weight": np.ones((3, 5), dtype=np.float16)}
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile.open(tmp_path / "theirs.gguf")
    assert file.metadata.integer("llama.block_count") == 2 and not file.metadata.flag("flag")
    assert file.metadata.array("tokenizer.ggml.tokens").strings() == ["a", "b", "ü"]
    assert file.metadata.array("tokenizer.ggml.scores").numpy().tolist() == [0.5, 1.5, 2.5]
    for name, tensor in tensors.items():
        assert file.tensors[name].shape == tensor.shape and file.read(name).numpy().tobytes() == tensor.tobytes()
    with GgufWriter(tmp_path / "ours.gguf", file.metadata, list(file.tensors.values())) as ours:
        for name in file.tensors:
            ours.write(name, file.read(name))
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


def test_everything_comes_back(tmp_path: Path) -> None:
    file = GgufFile.open(written(tmp_path / "m.gguf")).held()
    assert list(file.metadata) == list(METADATA)
    for key, entry in METADATA.items():
        read = file.metadata[key]
        assert read == entry or (key == "llama.eps" and read == Value("f32", float(np.float32(1e-6)))), key
    for spec in SPECS:
        tensor = file.tensors[spec.name]
        assert (tensor.type, tensor.shape, tensor.begin % 32) == (spec.type, spec.shape, 0)
        assert torch.equal(file.read(spec.name), rows(spec))
        skipped = 4 if len(spec.shape) == 1 else 1  # bytes of a number of the vector, or a row
        assert torch.equal(file.read_rows(spec.name, 1, 99), rows(spec)[skipped:])
        file.release(spec.name)
    assert file.read_rows("experts.weight", 2, 2).shape == (0, 3, 144)


def test_arrays_are_sequences_of_their_items() -> None:
    array = Array.of("string", ["a", "bc", "d"])
    assert (len(array), array[1], array[-1], array[:2], list(array)) == (3, "bc", "d", ["a", "bc"], ["a", "bc", "d"])
    assert array == Array.of("string", ["a", "bc", "d"]) and array != Array.of("string", ["a", "bc", "e"])
    assert list(Array.of("i16", [1, -2])) == [1, -2] and Array.of("i16", [1]) != Array.of("u16", [1])
    with pytest.raises(IndexError):
        array[3]


@pytest.mark.parametrize("kind", KINDS)
def test_values_that_a_type_cannot_hold(kind: str) -> None:
    wrong: list[object] = ["text", True, 2**70, -(2**70)]
    wrong = {"string": [1, "\ud800"], "bool": [1, "yes"], "f32": ["text", True, 1e300], "f64": ["text", True]}.get(
        kind, wrong
    )
    for value in wrong:
        with pytest.raises(ValueError, match=r" is no "):
            encoded(kind, value)  # type: ignore[arg-type]


def test_accessors_name_what_is_missing_or_of_another_type() -> None:
    metadata = Metadata(METADATA | {"nan": Value("f32", float("nan"))}, "m.gguf")
    assert metadata.number("llama.block_count") == 3.0 and metadata.text("none", "default") == "default"
    assert metadata.integer("none", 0) == 0 and metadata.flag("none", False) is False
    for call in (metadata.integer, metadata.number, metadata.flag, metadata.text, metadata.array):
        with pytest.raises(CheckpointError, match=r"m\.gguf: none is missing"):
            call("none")
        with pytest.raises(CheckpointError, match=r"m\.gguf: (yes|short) is (bool|i16) '"):
            call("yes" if call != metadata.flag else "short")
    with pytest.raises(CheckpointError, match="nan is nan"):
        metadata.number("nan")
    with pytest.raises(CheckpointError, match=r"scores is an array of f32, not an array of string or i32"):
        metadata.array("tokenizer.ggml.scores", "string", "i32")


# ---- split models ----------------------------------------------------------------------------------------------------


def test_a_split_model(tmp_path: Path) -> None:
    first = written(tmp_path / "m.gguf", split_bytes=1200)
    assert first.name == "m-00001-of-00002.gguf" and not (tmp_path / "m.gguf").exists()
    assert gguf.GGUFReader(tmp_path / "m-00002-of-00002.gguf").fields["split.no"].contents() == 1
    file = GgufFile.open(first)
    assert list(file.metadata) == list(METADATA) and list(file.tensors) == [spec.name for spec in SPECS]
    assert all(torch.equal(file.read(spec.name), rows(spec)) for spec in SPECS)
    with pytest.raises(CheckpointError, match="not the first"):
        GgufFile.open(tmp_path / "m-00002-of-00002.gguf")
    first.rename(tmp_path / "other.gguf")
    with pytest.raises(CheckpointError, match="not the first"):
        GgufFile.open(tmp_path / "other.gguf")
    (tmp_path / "other.gguf").rename(first)
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match="another file than its name"):
        GgufFile.open(first)
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(CheckpointError, match=r"has no m-00002-of-00002\.gguf"):
        GgufFile.open(first)


def test_files_of_two_split_models_are_not_mixed(tmp_path: Path) -> None:
    first = written(tmp_path / "m.gguf", split_bytes=1200)
    (tmp_path / "n").mkdir()
    other = written(tmp_path / "n" / "m.gguf", [*SPECS, TensorSpec("more", TYPES["F32"], (2,))], split_bytes=1200)
    second = "m-00002-of-00002.gguf"
    (tmp_path / second).unlink()
    (other.parent / second).rename(tmp_path / second)
    with pytest.raises(CheckpointError, match="4 tensors are promised, its files have 5"):
        GgufFile.open(first)
    twice = header_bytes(
        {"split.no": Value("u16", 1), "split.count": Value("u16", 2), "split.tensors.count": Value("i32", 4)},
        [TensorSpec("norm.weight", TYPES["F32"], (7,))],
    )
    (tmp_path / second).write_bytes(twice + bytes(32))
    with pytest.raises(CheckpointError, match=r"norm\.weight is in both"):
        GgufFile.open(first)


# ---- what is not written ---------------------------------------------------------------------------------------------


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


@pytest.mark.parametrize(
    ("name", "metadata", "specs", "message"),
    [
        ("m.bin", {}, SPECS, r"end with \.gguf"),
        ("m.gguf", {"a\nb": Value("u8", 1)}, SPECS, "cannot be written"),
        ("m.gguf", {"split.no": Value("u16", 1)}, SPECS, "cannot be written"),
        ("m.gguf", {"a": Value("u8", 256)}, SPECS, "256 is no u8"),
        ("m.gguf", {"general.alignment": Value("u32", 24)}, SPECS, "not a power of two"),
        ("m.gguf", {}, [*SPECS, SPECS[0]], "is there twice"),
        ("m.gguf", {}, [TensorSpec("a" * 64, TYPES["F32"], (3,))], "a name that llama.cpp refuses"),
        ("m.gguf", {}, [TensorSpec("a", TYPES["F32"], (1, 1, 1, 1, 1))], "not 1 to 4 axes"),
        ("m.gguf", {}, [TensorSpec("a", TYPES["F32"], (0, 3))], "not 1 to 4 axes"),
        ("m.gguf", {}, [TensorSpec("a", TYPES["Q4_K"], (3, 128))], "no whole blocks of 256"),
        ("m.gguf", {}, [TensorSpec("a", TYPES["F32"], (1 << 40,))], "GB free"),
    ],
)
def test_what_no_reader_takes_is_not_begun(
    name: str, metadata: dict[str, Entry], specs: list[TensorSpec], message: str, tmp_path: Path
) -> None:
    with pytest.raises(OutputError, match=message):
        GgufWriter(tmp_path / name, metadata, specs)
    assert left(tmp_path) == []


def test_nothing_is_left_of_what_failed(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"

    def fail(at: Callable[[GgufWriter], object], **options: object) -> None:
        with GgufWriter(path, METADATA, SPECS, split_bytes=1200, **options) as writer:  # type: ignore[arg-type]
            for spec in SPECS:
                at(writer)
                writer.write(spec.name, rows(spec))

    def wrong(_path: Path) -> None:
        assert [tensor.name for tensor in gguf.GGUFReader(_path).tensors] == [spec.name for spec in SPECS[:2]]
        assert list(GgufFile.open(_path).tensors) == [spec.name for spec in SPECS]
        assert not any((tmp_path / name).exists() for name in ("m.gguf", _path.name))
        raise CheckpointError("the check says no")

    with pytest.raises(AssertionError, match="promised is"):
        fail(lambda writer: writer.write("norm.weight", rows(SPECS[1])))
    assert left(tmp_path) == []
    with pytest.raises(AssertionError, match="promised is token_embd"):
        fail(lambda writer: writer.write(SPECS[0].name, rows(SPECS[0])[:, 1:]))
    assert left(tmp_path) == []
    with pytest.raises(AssertionError, match="4 promised tensors"), GgufWriter(path, METADATA, SPECS):
        pass
    assert left(tmp_path) == []
    with pytest.raises(CheckpointError, match="the check says no"):
        fail(lambda writer: None, check=wrong)
    assert left(tmp_path) == []


def test_nothing_is_overwritten_and_leftovers_are_cleared(tmp_path: Path) -> None:
    (tmp_path / "m.gguf.partial").mkdir()
    (tmp_path / "m.gguf.partial" / "m-00009-of-00009.gguf").write_bytes(b"of a run that was killed")
    written(tmp_path / "m.gguf")
    assert left(tmp_path) == ["m.gguf"]
    before = (tmp_path / "m.gguf").read_bytes()
    with pytest.raises(OutputError, match="exists already"):
        written(tmp_path / "m.gguf")
    with pytest.raises(OutputError, match="exists already"), GgufWriter(tmp_path / "n.gguf", {}, []) as writer:
        (tmp_path / "n.gguf").write_bytes(b"of somebody else")
    assert writer.paths == (tmp_path / "n.gguf",) and (tmp_path / "n.gguf").read_bytes() == b"of somebody else"
    assert (tmp_path / "m.gguf").read_bytes() == before and left(tmp_path) == ["m.gguf", "n.gguf"]


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("spicerack.storage.gguf.writer.os.fsync", full)
    with pytest.raises(OutputError, match=r"writing .*m\.gguf failed: No space left"):
        written(tmp_path / "m.gguf")
    assert left(tmp_path) == []


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()], ids=["disk", "ctrl-c"])
def test_of_a_split_model_all_files_appear_or_none(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    renamed: list[Path] = []

    def replace(path: Path, target: Path, rename: Callable[[Path, Path], Path] = Path.replace) -> Path:
        if renamed:
            raise error
        renamed.append(target)
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(OutputError if isinstance(error, OSError) else KeyboardInterrupt):
        written(tmp_path / "m.gguf", split_bytes=1200)
    assert renamed == [tmp_path / "m-00002-of-00002.gguf"] and left(tmp_path) == []


# ---- hostile files ---------------------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def table(name: str = "a", dims: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def content(
    *parts: bytes, keys: int = 0, tensors: int = 0, version: int = 3, magic: bytes = b"GGUF", data: int = 64
) -> bytes:
    head = magic + struct.pack("<IQQ", version, tensors, keys) + b"".join(parts)
    return head + bytes(-len(head) % 32 + data)


HOSTILE = {
    "begin with GGUF": content(magic=b"GGML"),
    "has version 1": content(version=1),
    "has version 4": content(version=4),
    "big-endian": content(version=0x03000000),
    "keys, more than": content(keys=1 << 63),
    "tensors, more than": content(tensors=1 << 63),
    "keys, more than are": content(keys=7),
    "a string of 9223372036854775808 bytes": content(struct.pack("<Q", 1 << 63), keys=1, data=80),
    "of 1000000 bytes": content(struct.pack("<Q", 1000000), keys=1),
    "bytes are promised": content(struct.pack("<Q", 900), keys=1),
    "not text in UTF-8": content(struct.pack("<Q", 2) + b"\xff\xfe" + bytes(30), keys=1),
    "not printable": content(entry("a\x1b[31m", 0, b"\1"), keys=1),
    "empty or not": content(entry("", 0, b"\1"), keys=1),
    "unknown type 13": content(entry("a", 13, bytes(8)), keys=1),
    "is there twice": content(entry("a", 0, b"\1"), entry("a", 0, b"\1"), keys=2),
    "neither true nor false but 2": content(entry("a", 7, b"\2"), keys=1),
    "neither true nor false$": content(entry("a", 9, struct.pack("<IQ", 7, 2) + b"\1\3"), keys=1),
    "arrays of arrays|array of arrays": content(entry("a", 9, struct.pack("<IQ", 9, 1) + bytes(20)), keys=1),
    "a: 4611686018427387904 items": content(entry("a", 9, struct.pack("<IQ", 4, 1 << 62)), keys=1),
    "a: 100 items": content(entry("a", 9, struct.pack("<IQ", 4, 100)), keys=1),
    "longer than the file": content(entry("a", 9, struct.pack("<IQQ", 8, 2, 1 << 62)), keys=1),
    "not text in UTF-8: ": content(entry("a", 8, struct.pack("<Q", 1) + b"\xff"), keys=1),
    "general.alignment is .*33": content(entry("general.alignment", 4, struct.pack("<I", 33)), keys=1),
    "general.alignment is .*'u64'": content(entry("general.alignment", 10, struct.pack("<Q", 32)), keys=1),
    "general.alignment is Value": content(entry("general.alignment", 4, bytes(4)), keys=1),
    "tensor a has 0 dimensions": content(table(dims=()), tensors=1),
    "tensor a has 5 dimensions": content(table(dims=(1,) * 5), tensors=1),
    r"has the shape \[0, 4\]": content(table(dims=(4, 0)), tensors=1),
    "more than the file has bytes for": content(table(dims=(1 << 32, 1 << 32, 1 << 32)), tensors=1),
    "tensor a has the unknown type 4": content(table(kind=4), tensors=1),
    "tensor a has the unknown type 99": content(table(kind=99), tensors=1),
    "no whole blocks of 32": content(table(kind=2, dims=(40,)), tensors=1),
    "no multiple of 32": content(table(offset=8), tensors=1),
    "the file has 128": content(table(offset=64), tensors=1),
    "ends at byte 36893488147419103": content(table(offset=(1 << 64) - 32), table("b"), tensors=2, data=80),
    "tensor a is there twice": content(table(), table(), tensors=2),
    "tensors a and b overlap": content(table(dims=(12,)), table("b", offset=32), tensors=2, data=80),
    "is cut off|bytes are promised": content(table(), tensors=1)[:50],
}


@pytest.mark.parametrize("message", HOSTILE)
def test_hostile_headers_are_refused_by_name(message: str, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(HOSTILE[message])
    pattern = message if "36893" not in message else "ends at byte 184467440737"
    with pytest.raises(CheckpointError, match=pattern.removesuffix("$")) as error:
        GgufFile.open(tmp_path / "m.gguf")
    assert str(tmp_path / "m.gguf") in error.value.message


@pytest.mark.parametrize("name", ["none.gguf", "folder.gguf", "empty.gguf"])
def test_what_is_no_file(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(CheckpointError):
        GgufFile.open(tmp_path / name)


def mutations(good: bytes, count: int) -> Iterator[bytes]:
    """Bytes set, numbers of four and eight bytes set to extremes, pieces cut out, doubled and cut off."""
    chance = random.Random(0)
    extremes = (0, 1, 9, 31, 33, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1)
    for _ in range(count):
        bad = bytearray(good)
        for _ in range(chance.randint(1, 3)):
            if not bad:
                break
            at, size = chance.randrange(len(bad)), chance.choice((1, 4, 8, 40))
            kind = chance.randrange(5)
            if kind == 0:
                bad[at] = chance.randrange(256)
            elif kind == 1:
                number = chance.choice(extremes).to_bytes(8, "little")[: min(size, 8)]
                bad[at : at + len(number)] = number
            elif kind == 2:
                del bad[at : at + size]
            elif kind == 3:
                bad[at:at] = bad[at : at + size]
            else:
                del bad[at:]
        yield bytes(bad)


@pytest.mark.slow
def test_thousands_of_mutated_files(tmp_path: Path) -> None:
    """Each is read within its own bytes, or refused with an error of ours, and none takes long."""
    good = written(tmp_path / "m.gguf").read_bytes()
    path, refused, read, slowest = tmp_path / "bad.gguf", 0, 0, 0.0
    for bad in mutations(good, 2500):
        path.write_bytes(bad)
        begin = time.process_time()
        try:
            file = GgufFile.open(path)
            for name, tensor in file.tensors.items():
                assert tensor.begin > 0 and tensor.begin + tensor.nbytes <= len(bad)
                assert file.read(name).numpy().tobytes() == bad[tensor.begin : tensor.begin + tensor.nbytes]
            for entry in file.metadata.values():
                assert list(entry) is not None if isinstance(entry, Array) else entry.raw is not None
            read += 1
        except SpicerackError as error:
            assert isinstance(error, CheckpointError) and error.hint and "bad" in error.message
            refused += 1
        slowest = max(slowest, time.process_time() - begin)
    assert refused > 1200 and read > 100 and slowest < 1


def test_limits_bound_what_a_large_file_can_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "m.gguf")
    for name, most, message in (
        ("MAX_KEYS", 14, "15 keys"), ("MAX_TENSORS", 3, "4 tensors"), ("MAX_ITEMS", 12, "2 items, more"),
        ("MAX_NAME", 20, "a string of 21 bytes"), ("MAX_AXES", 3, "4 dimensions, not 1 to 3"),
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(header, name, most)
            with pytest.raises(CheckpointError, match=message):
                GgufFile.open(tmp_path / "m.gguf")


def test_a_file_that_shrinks_is_noticed(tmp_path: Path) -> None:
    path = written(tmp_path / "m.gguf")
    file = GgufFile.open(path)
    path.write_bytes(path.read_bytes()[:-700])
    with pytest.raises(CheckpointError, match="its header promised"):
        file.read("experts.weight")
