"""`spicerack.export`: a model folder -> the file or folder that another engine reads, with the same codes.

    open -> hold (every tensor exactly, or refused) -> look at the scales -> target.write -> verify -> the name

All that can be refused is refused before a byte is written: by headers what the target has no scheme for, by a look at
the scales what its type of scales does not hold. A float model is quantized on the way, into a folder that goes again.
"""

from __future__ import annotations

import glob
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from spicerack.arguments import checked
from spicerack.errors import OutputError, UsageError
from spicerack.exports import loss, releases, verify
from spicerack.exports import target as targets
from spicerack.exports.planning import plan
from spicerack.exports.restoring import restored
from spicerack.exports.source import Source
from spicerack.exports.target import Order, Target
from spicerack.machine.memory import peak_rss_bytes
from spicerack.numerics import codec, rounding
from spicerack.quantization import recipe
from spicerack.quantization.run import FolderOptions, of_folder
from spicerack.runtime.folder import Folder
from spicerack.storage import engine as engines
from spicerack.storage import format as formats
from spicerack.storage.durable import CONTINUES, NOTHING_LEFT, disk_error
from spicerack.storage.engine import Engine
from spicerack.storage.files import local
from spicerack.storage.holding import Held
from spicerack.storage.released import Released
from spicerack.storage.writer import refuse_place


@dataclass(frozen=True, slots=True)
class Rounded:
    """Layers that were rounded again because the target does not hold their scheme.

    rule    why, of the first
    given   the scheme that they had
    scheme  the nearest that the target has
    count   how many
    error   ||after - before|| / ||before|| over all of their weights
    """

    rule: str
    given: str
    scheme: str
    count: int
    error: float


@dataclass(frozen=True, slots=True)
class Written:
    """What was exported.

    output          the file or folder
    to              as what
    nbytes          on the disk
    packed, floats  how many tensors of each
    seconds         of the call
    peak_rss_bytes  the most memory that the process had
    verified_by     who read every tensor back and found it equal
    foreign         whether that was the engine's own code
    notes           what a person should know
    rounded         what was rounded again; empty where every weight is what it was
    added_kl        what that cost, in nats per token; None where nothing was rounded, or there is no text
    """

    output: Path
    to: str
    nbytes: int
    packed: int
    floats: int
    seconds: float
    peak_rss_bytes: int
    verified_by: str
    foreign: bool
    notes: tuple[str, ...] = ()
    rounded: tuple[Rounded, ...] = ()
    added_kl: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """By the names of the command line's contract."""
        return {
            "output": str(self.output),
            "to": self.to,
            "bytes": self.nbytes,
            "packed": self.packed,
            "floats": self.floats,
            "seconds": self.seconds,
            "peak_rss_bytes": self.peak_rss_bytes,
            "verified_by": self.verified_by,
            "foreign": self.foreign,
            "exact": not self.rounded,
            "rounded": [
                {"given": r.given, "scheme": r.scheme, "layers": r.count, "error": r.error, "rule": r.rule}
                for r in self.rounded
            ],
            "added_kl": self.added_kl,
            "notes": list(self.notes),
        }


@checked
def export(
    model: str | Path,
    *,
    to: str,
    output: str | Path,
    scheme: str | None = None,
    for_: str | None = None,
    requantize: bool = False,
    text: str | Path | None = None,
    shard_bytes: int | None = None,
) -> Written:
    """Write a model for another engine, with the codes that it has.

    model        a folder or hub id, quantized; or float, with `scheme`, or to what holds floats as they are stored
    to           what for: one of `exports.target.names()`
    output       the file or folder to write, which must not exist
    scheme       what a float model is quantized in first, rounded to nearest
    for_         the engine that it is for, by one of `storage.engine.names()`: it may compute less than the format
                 holds, and layers are then in what it does compute; None: whoever reads the format
    requantize   layers that the target has no scheme for are rounded again, to the nearest that it has
    text         what that cost is measured on, as for `evaluate`; None: `heldout.txt` in the folder, if there is one
    shard_bytes  the largest file, where there are several; None: the target's own

    Raises UsageError of all kinds before a byte is written: what the target cannot hold is named by layer and rule,
    with the nearest scheme; and WeightError for a scale that its type of scales does not hold. Raises OutputError where
    what was written is not read back as it was meant; then nothing is left.
    """
    begin, target, place = time.time(), targets.find(to), _place(output)
    engine = None if for_ is None else engines.find(for_)
    with _opened(model, scheme, for_, target, place) as folder:
        order = Order(to, place, lambda _path: None, {}, shard_bytes)
        with _one_thread():
            written = _export(restored(Source.of(folder)), target, engine, order, begin, requantize=requantize)
        if not written.rounded:
            return written
        return replace(written, added_kl=loss.measured(folder, written.output, text))


@checked
def import_model(model: str | Path, *, output: str | Path, shard_bytes: int | None = None) -> Written:
    """Write a model that another tool quantized as a folder of ours, with the codes that it has.

    model        a file or folder of any format that is read, or a hub id
    output       the folder to write, which must not exist
    shard_bytes  its largest file; None: 2 GB

    The format is the one that `quantize` would choose for such a model. Of releases in FP8 codes are kept here, where
    rows have a scale (`exports.releases`). Raises as `export` does.
    """
    begin, place, folder = time.time(), _place(output), Folder.open(model)
    if isinstance(folder.checkpoint, Released):
        folder = releases.kept(folder.checkpoint)
    if folder.format is None:
        raise UsageError(
            f"{folder.checkpoint.folder} has nothing quantized whose codes could be kept",
            "quantize it, or use it as it is",
        )
    with _one_thread():
        given = restored(Source.of(folder))
        to = formats.choose(given.contents).name.replace("_", "-")
        order = Order(to, place, lambda _path: None, {}, shard_bytes)
        return _export(given, targets.find(to), None, order, begin)


def _place(output: str | Path) -> Path:
    """Where to write. Raises OutputError where nothing can be, or something is."""
    place = local(output)
    refuse_place(place)
    if place.exists():
        raise OutputError(f"{place} exists", "choose another name, or remove it")
    return place


@contextmanager
def _opened(model: str | Path, scheme: str | None, for_: str | None, target: Target, place: Path) -> Iterator[Folder]:
    """The folder, within; of a float model that is quantized on the way one that is made beside `place`, and goes at
    the end."""
    folder = Folder.open(model)
    if scheme is None:
        folder = releases.in_mxfp4(folder)
        if folder.format is None and not target.floats:
            raise UsageError(f"{folder.checkpoint.folder} is not quantized", "give --scheme, such as w4g32")
        yield folder
        return
    if folder.format is not None:
        raise UsageError(
            f"{folder.checkpoint.folder} is quantized already", "leave --scheme out, or start from the float model"
        )
    with _folder_beside(place) as beside:
        try:
            chosen = recipe.of(scheme).with_choices(None, None, None, True, for_)
            of_folder(model, chosen, FolderOptions(beside / "quantized"))
        except OutputError as error:
            hint = NOTHING_LEFT if error.hint == CONTINUES else error.hint
            raise OutputError(f"quantizing on the way: {error.message}", hint) from error
        yield Folder.open(beside / "quantized")


@contextmanager
def _folder_beside(place: Path) -> Iterator[Path]:
    """A folder beside `place` that goes at the end, as do parents that were made for it unless `place` is in them by
    then. Raises OutputError where none can be made."""
    made = [folder for folder in place.parents if not folder.exists()]
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        beside = tempfile.TemporaryDirectory(prefix=f".{place.name}.", dir=place.parent)
    except OSError as error:
        raise disk_error(error, place, stays=False) from error
    try:
        with beside as path:
            yield Path(path)
    finally:
        with suppress(OSError):  # what is asked for is in it
            for folder in made:
                folder.rmdir()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Within, torch computes in this thread alone.

    All that is done to a tensor takes milliseconds, at the speed of memory. Where other programs want the processor,
    too, teams wait at the end of each operation for the one that does not run: exports took seven times as long.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _export(
    given: Source, target: Target, engine: Engine | None, order: Order, begin: float, *, requantize: bool = False
) -> Written:
    """The same for a source that is open. begin: of the call."""
    to, place = order.to, order.output
    given.refuse_gaps()
    planned = plan(given, target, to, requantize=requantize, engine=engine)
    source = planned.source
    target.write(source, replace(order, check=partial(verify.verify, planned.reader, source), facts=planned.facts))
    place = _first_file(place)
    return Written(
        place, to, _nbytes(place), len(source.contents), len(source.floats), round(time.time() - begin, 3),
        peak_rss_bytes(), planned.reader.name, planned.reader.foreign,
        (*target.notes(to, source), *_activations(given, source), *_unread(to, source)),
        _rounded(given, source, planned.held),
    )  # fmt: skip


def _unread(to: str, source: Source) -> Iterator[str]:
    """A note where every engine that reads such files is known not to have the model's family."""
    family = source.config.get("model_type")
    reasons = [
        way.family_obstacle(engine.name, family) for engine in engines.every() for way in engine.reads if way.to == to
    ]
    if reasons and all(reasons):
        yield f"{'; '.join(filter(None, reasons))}: it is for programs that have code of their own for it"


def _activations(given: Source, source: Source) -> Iterator[str]:
    """Notes on layers whose weights are what they were, and whose inputs are treated otherwise."""
    pairs = {
        (stored.scheme.activations, source.contents[module].scheme.activations)
        for module, stored in given.contents.items()
    }
    if any(before is None and after is not None for before, after in pairs):
        yield "inputs of layers are rounded to int8 there, which they are not in the source; weights are the same"
    if any(before is not None and after is None for before, after in pairs):
        yield "inputs of layers stay floats there, where the source rounds them to int8; weights are the same"


def _rounded(given: Source, source: Source, held: Mapping[str, Held]) -> tuple[Rounded, ...]:
    """What was rounded again, layers of one pair of schemes together, with what it changed; read once more."""
    sums: dict[tuple[str, str], list[float]] = {}
    rules: dict[tuple[str, str], str] = {}
    for module, one in held.items():
        if one.exact:
            continue
        before, after = given.packed(module), source.packed(module)
        w = codec.decode(replace(before, transposed=False))
        size = float(w.square().sum(dtype=torch.float64))
        error = rounding.relative_error(w, after) ** 2 * size
        key = before.scheme.name, after.scheme.name
        total = sums.setdefault(key, [0.0, 0.0, 0.0])
        total[0], total[1], total[2] = total[0] + error, total[1] + size, total[2] + 1
        rules.setdefault(key, str(one.rule))
        source.release(source.contents[module])
    return tuple(
        Rounded(rules[key], *key, int(count), (error / size) ** 0.5 if size else 0.0)
        for key, (error, size, count) in sums.items()
    )


def _first_file(place: Path) -> Path:
    """What was written under a name: that, or the first file of those that a model was split into."""
    return place if place.exists() else next(place.parent.glob(f"{glob.escape(place.stem)}-00001-of-*{place.suffix}"))


def _nbytes(place: Path) -> int:
    """Bytes of a file (of all, of a split model), or of all files of a folder."""
    stem, split, rest = place.name.rpartition("-00001-of-")
    if place.is_file():
        files = place.parent.glob(f"{glob.escape(stem)}-*-of-{rest}") if split else [place]
    else:
        files = place.rglob("*")
    return sum(path.stat().st_size for path in files if path.is_file())
