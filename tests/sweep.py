"""What every family of transformers does under each recipe: written with spicerack, read by transformers alone.

    written    one process: a tiny model, its folders by each recipe, the same decoded to floats, and what was measured
    read       another, which has not imported spicerack: the folders in transformers, against the decoded ones

`docs/families.md` is the table of both: `python tests/sweep.py --write` makes it anew.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tiny
import torch
import transformers
from torch import nn

RECIPES = ("w8", "w4g32", "w8a8", "w4g32, some w8")
"""What is swept. The last has every second kind of layer in w8."""
MOST = 1e-3
"""Of what a tensor differs, relative to its norm: `dequantize` multiplies in float16 where scales are stored so, which
is 2^-11 at most of a number, and .0003 over all of them."""


# ---- written ---------------------------------------------------------------------------------------------------------


def written(family: str, folder: Path, measure: bool = False) -> dict[str, Any]:
    """Writes the family's folders under `folder` -> what was decided and, if asked, measured: recipe -> cell.

    A cell has `scheme` (what a shape made of the recipe's), `format`, and `unread`: what was said of transformers
    before work; or `refused`, the reason.
    """
    from dense import decoded_folder

    from spicerack.errors import ShapeError, SpicerackError

    model = tiny.build(family)
    model.save_pretrained(folder / "float")
    row: dict[str, Any] = {"class": type(model).__name__, "cells": {}}
    given, expected = None, None
    if measure:
        with contextlib.suppress(Exception):  # not every family's inputs are known here
            expected = answer(model, tiny.inputs(model))
            given = tiny.inputs(model)
    for recipe in RECIPES:
        out = folder / recipe
        try:
            try:
                cell = _quantized(folder / "float", recipe, out)
            except ShapeError:  # no whole groups of 32: a row is one
                cell = _quantized(folder / "float", recipe.replace("g32", ""), out)
        except SpicerackError as error:
            row["cells"][recipe] = {"refused": str(error)}
            continue
        row["cells"][recipe] = cell
        if cell["format"] == "compressed_tensors":
            decoded_folder(out, folder / f"{recipe}, decoded")
        if measure:
            row["cells"][recipe]["error"] = _error(out, given, expected)
    if measure:
        row |= _measured(model, folder, given)
    return row


def _quantized(source: Path, recipe: str, out: Path) -> dict[str, Any]:
    """The folder, and what was said of it before work."""
    from spicerack.quantization.job import prepare
    from spicerack.quantization.recipe import decided, of
    from spicerack.quantization.run import execute

    scheme, _, mixed = recipe.partition(",")
    rules = _rules(source) if mixed else []
    job = prepare(source, decided(of(scheme, rules), with_text=False))
    execute(job, out)
    weights = [a for a in job.actions if len(a.info.shape) > 1 and a.role not in ("embedding", "head")]
    packed = sum(a.info.numel for a in weights if a.stored is not None)
    return {
        "scheme": recipe,
        "format": job.format.name,
        "unread": [note for note in job.notes if "transformers does not" in note],
        "notes": list(job.notes),
        "schemes": len({a.stored.scheme for a in job.actions if a.stored is not None}),
        "share": packed / max(1, sum(a.info.numel for a in weights)),
    }


def _rules(source: Path) -> list[str]:
    """w8 for every second kind of linear layer."""
    from spicerack.models import census
    from spicerack.models.architecture import cuts, on_meta
    from spicerack.storage.cutting import cut
    from spicerack.storage.reader import Checkpoint

    checkpoint = Checkpoint.open(source)
    wholes = cuts(on_meta(checkpoint.config), {name: info.shape for name, info in checkpoint.tensors.items()})
    entries = census.take(cut(checkpoint, wholes)).entries.values()
    kinds = sorted(
        {entry.module.rpartition(".")[2] for entry in entries if entry.role == "linear" and "." in entry.module}
    )
    return [f"**.{kind}=w8" for kind in kinds[::2] if not kind.isdigit()]


def _measured(model: transformers.PreTrainedModel, folder: Path, given: Any) -> dict[str, str]:
    """What becomes of generation from the w8 folder, and of calibration: "ok", "refused", "-", or what was raised."""
    import spicerack
    from spicerack.errors import SpicerackError
    from spicerack.text.calibration import Calibration

    def verdict(act: Callable[[], object]) -> str:
        try:
            act()
        except SpicerackError:
            return "refused"
        except Exception as error:  # noqa: BLE001  a raw exception is what is looked for
            return type(error).__name__
        return "ok"

    def generate() -> None:
        spicerack.load(folder / "w8").generate(given["input_ids"], **short)

    def calibrate() -> None:
        ids = torch.randint(5, 200, (8, 24), generator=torch.Generator().manual_seed(2))
        text = Calibration(ids, None, "of no text", 0.0, "made up")
        spicerack.quantize(folder / "float", "w4", output=folder / "calibrated", method="gptq", calibration=text)

    short: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    reads_text = given is not None and "input_ids" in given
    generates = reads_text and model.can_generate() and verdict(lambda: model.generate(given["input_ids"], **short))
    return {
        "generates": verdict(generate) if generates == "ok" else "-",  # the float model is what it must equal
        "calibrates": verdict(calibrate) if reads_text else "-",
    }


@torch.no_grad()
def answer(model: nn.Module, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The first floats that the model returns, in a row."""
    torch.manual_seed(0)  # some draw noise
    return next(_floats(model(**given)))


def _floats(output: Any) -> Iterator[torch.Tensor]:
    """Every float tensor of an output, flat."""
    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield output.float().flatten()
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _floats(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _floats(value)


def _error(out: Path, given: Any, expected: torch.Tensor | None) -> float | str | None:
    """Of the answer, relative to the float model's, or what was raised; None where the model was not asked."""
    import spicerack

    if expected is None:
        return None
    try:
        got = answer(spicerack.load(out, compute="float"), given)
    except Exception as error:  # noqa: BLE001  a raw exception is what is looked for
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return float((got - expected).norm() / expected.norm())


# ---- read ------------------------------------------------------------------------------------------------------------


def read(row: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Recipe -> what transformers makes of its folder: "equal", or what differs, or what it raises."""
    model = getattr(transformers, row["class"])
    return {
        recipe: _verdict(model, folder / recipe, folder / f"{recipe}, decoded")
        for recipe, cell in row["cells"].items()
        if cell.get("format") == "compressed_tensors"
    }


def _verdict(model: Any, packed: Path, decoded: Path) -> str:
    """Whether the weights are those of the decoded folder, whatever is raised on the way."""
    try:
        loaded, wanted = model.from_pretrained(packed), model.from_pretrained(decoded)
        for hook in list(loaded._forward_pre_hooks.values()):  # of compressed-tensors: it decodes
            hook(loaded, ())
    except Exception as error:  # noqa: BLE001  whatever the other project raises is the answer
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    states = loaded.state_dict(), wanted.state_dict()
    for name, tensor in states[1].items():
        got = states[0].get(name)
        if got is None or got.shape != tensor.shape:
            return f"{name} is not there"
        apart = (got.float() - tensor.float()).norm()
        if not apart <= MOST * tensor.float().norm():
            return f"{name} differs by {float(apart / tensor.float().norm()):.2g}"
    return "equal"


# ---- both ------------------------------------------------------------------------------------------------------------

_SECONDS = 90
"""For a family, before it is given up."""


@contextlib.contextmanager
def _in_time() -> Iterator[None]:
    """TimeoutError where what is within takes too long."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {_SECONDS} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)


def _quiet() -> None:
    """As a process of its own begins: one thread, no hub, no bars, no warnings of others."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def write_all(folder: Path, names: Sequence[str], *, measure: bool) -> None:
    """`written` for each family: a file FAMILY.json in `folder`, `unbuilt` with the reason where none is built."""
    for name in names:
        try:
            with _in_time():
                row = written(name, folder / name, measure)
        except Exception as error:  # noqa: BLE001  whatever a constructor raises
            row = {"unbuilt": f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"}
        (folder / f"{name}.json").write_text(json.dumps(row))


def read_all(folder: Path, names: Sequence[str]) -> None:
    """`read` for each family: adds `read` to its FAMILY.json, and removes its folders."""
    for name in names:
        file = folder / f"{name}.json"
        row = json.loads(file.read_text())
        if "class" in row:
            with _in_time():
                row["read"] = read(row, folder / name)
            file.write_text(json.dumps(row))
        shutil.rmtree(folder / name, ignore_errors=True)
    assert "spicerack" not in sys.modules, "transformers alone"


def swept(folder: Path, names: Sequence[str], *, measure: bool) -> dict[str, dict[str, Any]]:
    """Family -> its row, of two processes: one that writes, and one that reads."""
    run = [sys.executable, __file__, str(folder)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    for what in ("measure" if measure else "write", "read"):
        subprocess.run([*run, what, *names], check=True, env=environment)
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in names}


def wrong(row: Mapping[str, Any]) -> list[str]:
    """Cells of a row in which something is silently wrong: said to be read and is not, or the other way round."""
    cells = row.get("cells", {})
    return [
        f"{recipe}: {verdict}, and was announced {'as not' if cells[recipe]['unread'] else 'to be'} read"
        for recipe, verdict in row.get("read", {}).items()
        if (verdict == "equal") == bool(cells[recipe]["unread"])
    ]


# ---- the table -------------------------------------------------------------------------------------------------------

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
_AT_ONCE = 40
"""Families of a pair of processes: a start takes as long as two families."""
_WHY = {
    "no attribute 'weight'": "its initialisers look at weights that are packed",
    "one scheme for all experts": "it takes one scheme for all experts",
    "source keys": "its conversion of names knows no packed weights",
    "experts": "it drops int8 experts while it stacks them",
    "conversion": "a conversion of the family's own fails",
}
"""What a note says of transformers -> the same in the words of the page."""
_HEAD = """# Families

Every family of transformers {version} of which a tiny random model can be built ({built} of {all}; the others need
packages that are not here, or are not tiny), quantized from a folder and read again. Written by
`python tests/sweep.py --write`; do not edit. `make interop` holds all of the reading against transformers, and some
rows against this page.

- **packed**: share of the numbers in all tensors with two axes or more that w8 packs, embeddings and heads left out.
- **w8**, **w4g32**: error of the first output in % of its norm, against the float model; random weights, which suffer
  more than trained ones. * rows in place of groups, where 32 divides no layer's width. "-": its inputs are not known.
- **generates** (from w8), **calibrates** (`gptq`): "refused": by name, before work. An exception's name: a fault.
- **read**: what transformers makes of the folder alone, every tensor against its decoded value. "no": it does not load,
  which `quantize` says before work, and the last column why. "own": our container, at which it stops. "none": nothing
  was quantized, or was refused.
- **mixed**: w4g32, with every second kind of layer in w8.

| family | packed | w8 | w4g32 | generates | calibrates | w8 read | w4g32 read | w8a8 read | mixed read | why not |
|---|---|---|---|---|---|---|---|---|---|---|
"""


def line(family: str, row: Mapping[str, Any]) -> str:
    """A family's row of the table."""
    cells = row["cells"]
    first = cells["w8"]
    share = f"{100 * first['share']:.0f}" if "share" in first else "-"
    reads = [_read(cells[recipe], row["read"].get(recipe)) for recipe in RECIPES]
    unread = [note for cell in cells.values() for note in cell.get("unread", ())]
    why = sorted({next((told for part, told in _WHY.items() if part in note), "see the note") for note in unread})
    columns = [
        family, share, _percent(first), _percent(cells["w4g32"]), row.get("generates", "?"), row.get("calibrates", "?"),
        *reads, "; ".join(why),
    ]  # fmt: skip
    return f"| {' | '.join(columns)} |"


def _percent(cell: Mapping[str, Any]) -> str:
    """The error, or what was raised."""
    error = cell.get("error", "?" if "share" in cell else None)
    if error is None:
        return "-"
    if isinstance(error, str):
        return error.partition(":")[0]
    return f"{100 * error:.1f}{'*' if cell['scheme'] == 'w4' else ''}"


def _read(cell: Mapping[str, Any], verdict: str | None) -> str:
    """What transformers makes of a folder, in a word."""
    if "refused" in cell or cell["schemes"] == 0:
        return "none"
    if cell["format"] == "spicerack":
        return "own"
    if cell["unread"]:
        return "no" if verdict != "equal" else "**yes, and was announced not to be**"
    return "yes" if verdict == "equal" else f"**{verdict}**"


def page(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """All of docs/families.md."""
    built = {family: row for family, row in rows.items() if "class" in row}
    head = _HEAD.format(version=transformers.__version__, built=len(built), all=len(rows))
    return head + "\n".join(line(family, row) for family, row in built.items()) + "\n"


def write_page(measure: bool = True, at_once: int = 2) -> None:
    """Sweeps all families, `at_once` processes beside each other, and writes docs/families.md."""
    names = list(tiny.families())
    parts = [names[i : i + _AT_ONCE] for i in range(0, len(names), _AT_ONCE)]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(at_once) as pool:
        swept_parts = pool.map(lambda part: swept(Path(folder), part, measure=measure), parts)
        rows = {family: row for part in swept_parts for family, row in part.items()}
    PAGE.write_text(page(rows))


def main(*arguments: str) -> None:
    """`--write`, or one of its processes: FOLDER write|measure|read FAMILY..."""
    if arguments == ("--write",):
        write_page()
        return
    folder, what, *names = arguments
    _quiet()
    if what == "read":
        read_all(Path(folder), names)
    else:
        write_all(Path(folder), names, measure=what == "measure")


if __name__ == "__main__":
    main(*sys.argv[1:])
