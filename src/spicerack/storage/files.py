"""Which files make up a model folder: its weight shards, and the side files that a copy needs. Opens no weight file.

Folders come from strangers, so names are checked before they are used:

- a shard is a plain file name; `../x` in an index is refused;
- a weight file may be a link to anywhere (large disks are mounted where they fit): it is only parsed as safetensors;
- a side file may be a link inside the folder or into the `blobs` of a Hugging Face cache. Any other link is refused,
  because a copy of it would carry, say, a private key out of the machine under an innocent name;
- devices, pipes and sockets are never opened.

A model's folder may hold other models: a trainer's checkpoints, an adapter, a quantized output. They are told by what
they hold and not by their names, and nothing of them gets into a copy.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from spicerack.errors import CheckpointError

CONFIG = "config.json"
"""What a model is: its class and sizes. It is written last of all files, so that a folder with it is whole."""
SINGLE = "model.safetensors"
"""The weights of a model that has one shard."""
INDEX = "model.safetensors.index.json"
"""Which shard holds which tensor, where there are several."""
MAX_CONFIG_BYTES = 16 << 20
MAX_INDEX_BYTES = 256 << 20
"""JSON of strangers that is larger is refused before it is read; an index takes about 100 bytes a tensor."""
_MOST_LABELS = 10_000_000
"""Classes of a head, for which configs make a name each: a gigabyte or two."""
MAX_SIDE_FILES = 10_000
"""A folder with more files than that is not a model's, but somebody's home, say."""

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
"""Ends of names of weights that are Python objects: to read one is to execute it. They are never opened."""
OTHER_WEIGHTS = (
    *PICKLED,
    ".safetensors",
    ".gguf",
    ".ggml",
    ".h5",
    ".msgpack",
    ".ot",
    ".onnx",
    ".onnx_data",
    ".tflite",
    ".npz",
)
"""Weights of other engines, and duplicates of ours: never copied, because they would still be the unquantized model."""
_ADAPTER = "adapter_config.json"
"""PEFT's: with it in a folder transformers puts an adapter on the model."""
_MARKS = (CONFIG, _ADAPTER, "trainer_state.json", "model_index.json", "progress.json")
"""Files beside weights that make a sub-folder a model of its own."""
_TRAINING_RECORDS = re.compile(r"trainer_state\.json|.*\.tfevents\..*")
"""What training leaves behind: curves and paths of the machine that it ran on, and nothing that a model needs."""
LEDGER, RUN = "spicerack.json", "run.json"
"""Records of a quantization: what happened to every tensor, and what was true of that run only."""
SENSITIVITY = "sensitivity.json"
"""What each part of a model loses in each scheme (`planning.sensitivity`)."""
MEASURED = ("lens.json", "eval.json", "bench.json", "energy.json", SENSITIVITY, "report.html")
"""What was measured of a quantized folder, and the page about it, by commands of these names; no part of the model."""
QUANTIZATION = ("quantization_config", "compression_config")
"""Sections of config.json in which a tool says how it quantized the model; the second is an older name."""
CONTAINER = "spicerack"
"""`model_type` of folders that only spicerack reads; the model's own config is nested under `config`."""

HUB_ALLOW = (
    "*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken", "*.spm", "*.vocab", "*.md",
    "LICENSE*", "NOTICE*",
)  # fmt: skip
"""What is fetched from the hub: no pickled weights."""
HUB_IGNORE = ("onnx/*", "openvino/*", "original/*", "metal/*", "consolidated*")
"""What is not, of those: the same model once more, for other programs or in other formats."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
"""An owner, a slash and a name; whether the hub has it, the hub says."""


@dataclass(frozen=True, slots=True)
class Files:
    """The files of a model folder, by name relative to it.

    folder      where they are
    shards      safetensors files of the model
    index       tensor -> shard as the index says, None without an index
    side_files  every other file that belongs to the model: what a copy needs
    left_out    what is not part of the model, and neither read nor copied: weight files of other engines, duplicates,
                records of training; sub-folders that are models of their own, whose names end in "/"
    """

    folder: Path
    shards: tuple[str, ...]
    index: dict[str, str] | None
    side_files: tuple[str, ...]
    left_out: tuple[str, ...]


def find(folder: Path) -> Files:
    """The files of a model folder, looked over by their names; no weight file is opened.

    folder: exists. Shards are the one of the usual name, else those of an index, else the only safetensors file that
    there is. Raises CheckpointError, naming the file and the rule: several weight files without an index, pickled or
    GGUF weights alone, an adapter (beside a model, too), an unfinished output, names that lead out of the folder,
    links to elsewhere.
    """
    if folder.is_file():
        raise CheckpointError(
            f"{folder} is a GGUF file, where a model folder is wanted", "give the folder it came from"
        )
    index: dict[str, str] | None = None
    index_name = _index_name(folder)
    if (folder / SINGLE).is_file():  # transformers prefers it to an index, too
        shards: tuple[str, ...] = (SINGLE,)
    elif index_name is not None:
        index = _read_index(folder / index_name)
        shards = tuple(sorted(set(index.values())))
    else:
        shards = (_only_weight_file(folder),)
    if (folder / _ADAPTER).exists():
        raise CheckpointError(
            f"{folder / _ADAPTER} lies beside the model: transformers puts that adapter on, the weights are without it",
            "merge it into the model first (merge_and_unload), or move adapter_* to a folder of their own",
        )
    side_files, left_out = _side_files(folder, {*shards, index_name or INDEX})
    return Files(folder, shards, index, side_files, left_out)


def locate(model: str | Path) -> Path:
    """Where a model lies, absolute: the local folder, or a snapshot of a hub id such as `org/name`.

    A folder comes before a hub id of the same name. A hub id is fetched into the hub's own cache, without pickled
    weights (`HUB_ALLOW`), or found there. A .gguf file is a model, too, and its own place. Raises CheckpointError for
    other files, paths that do not exist, and what the hub does not give.
    """
    path = local(model)
    if path.is_dir():
        return path.resolve()
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return path.resolve()
        raise CheckpointError(f"{path} is a file, not a model folder", f"give the folder that holds it: {path.parent}")
    if isinstance(model, str) and _HUB_ID.fullmatch(model):
        return _download(model)
    raise CheckpointError(f"{path} does not exist", "give a model folder, or a hub id such as 'org/name'")


def local(path: str | Path) -> Path:
    """A path as it was given, of a folder or file that may not exist yet, with `~` for somebody's home folder.

    A shell expands `~` before a program sees it, but not behind a `=`, and Python does not. A user that there is not
    leaves the path as it is.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:  # no such user, or nobody's home
        return Path(path)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder, without what says nothing: an empty section about quantization, of a float model.

    Some tools write `"quantization_config": null` or `{}`, here or in a nested model's config, where others leave the
    key out. Raises CheckpointError as `read_json` does, and for numbers of labels that nobody has.
    """
    config = read_json(folder / CONFIG, MAX_CONFIG_BYTES)
    _check_labels(folder / CONFIG, config)
    return _without_empty(config)


def _check_labels(path: Path, config: dict[str, Any]) -> None:
    """Raise CheckpointError where transformers would write down more names of labels than memory holds.

    It does so whenever it makes a config of this one, also of a model without labels.
    """
    for key, value in config.items():
        if key == "num_labels" and isinstance(value, int) and value > _MOST_LABELS:
            raise CheckpointError(
                f"{path}: {key} is {value}; at most {_MOST_LABELS} are read", "do not trust this folder"
            )
        if isinstance(value, dict):
            _check_labels(path, value)


def _without_empty(config: dict[str, Any]) -> dict[str, Any]:
    """The config, and configs in it, without empty sections about quantization; a copy."""
    return {
        key: _without_empty(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if value or key not in QUANTIZATION
    }


def read_json(path: Path, max_bytes: int) -> dict[str, Any]:
    """A JSON object from a stranger's file.

    max_bytes: a larger file is refused before it is read, so that nobody's memory is filled by a config. Raises
    CheckpointError if it is missing, too large, no JSON (nesting too deep for the parser is none), or anything but an
    object.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing", "a model folder has a config.json beside its *.safetensors files")
    size = path.stat().st_size
    if size > max_bytes:
        raise CheckpointError(f"{path} has {size} bytes; at most {max_bytes} are read", "is it really a JSON file?")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}", "fetch the file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, not an object", "fetch the file again")
    return value


def _download(hub_id: str) -> Path:
    """A snapshot of a hub id in the hub's own cache, fetched if it is not there.

    Raises CheckpointError with the first line of the hub's reason, which is what a person needs of it: no such model,
    no access, no network.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        folder = snapshot_download(hub_id, allow_patterns=list(HUB_ALLOW), ignore_patterns=list(HUB_IGNORE))
    except (OSError, HFValidationError) as error:  # hub, network and cache errors are OSErrors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{hub_id} is not a local folder, and the hub gave nothing: {reason}",
            "check the name and the connection, or download the model and give its folder",
        ) from error
    return Path(folder).resolve()


def _index_name(folder: Path) -> str | None:
    """The index: the one of the usual name, else the only one of any name (`consolidated.safetensors.index.json`)."""
    names = sorted(path.name for path in folder.glob("*.safetensors.index.json"))
    if INDEX in names:
        return INDEX
    return names[0] if len(names) == 1 else None


def _read_index(path: Path) -> dict[str, str]:
    """Tensor -> shard. Raises CheckpointError for shards that are not plain names of files beside the index."""
    weight_map = read_json(path, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map", "save the model again with save_pretrained")
    for tensor, shard in weight_map.items():
        plain = (
            isinstance(shard, str) and PurePosixPath(shard).name == shard and "\\" not in shard and "\0" not in shard
        )
        if not plain or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{path}: tensor {tensor!r} is said to be in {shard!r}, which is not a *.safetensors file beside it",
                "do not trust this folder, or save the model again with save_pretrained",
            )
        if not (path.parent / shard).is_file():
            raise CheckpointError(
                f"{path.parent / shard} is missing: {path.name} says it holds {tensor!r}", "fetch the missing shard"
            )
    return weight_map


def _only_weight_file(folder: Path) -> str:
    """The name of the one safetensors file of a folder without an index.

    Raises CheckpointError that says what another folder is: an adapter, several files whose belonging is not known,
    pickled weights, a GGUF folder, an output that was not finished, or nothing of the kind.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    candidates = [name for name in names if name.endswith(".safetensors")]
    if "adapter_config.json" in names:
        raise CheckpointError(
            f"{folder} is an adapter, not a model", "merge it into its base model first (merge_and_unload)"
        )
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        raise CheckpointError(
            f"{folder} has {len(candidates)} safetensors files and no {INDEX}: which belong to the model is not known",
            "add the index, or save the model again with save_pretrained",
        )
    pickled = [name for name in names if name.endswith(PICKLED)]
    if pickled:
        raise CheckpointError(
            f"{folder / pickled[0]}: pickled weights are not read, because pickled files can execute code",
            "load them with transformers in a sandbox, and save_pretrained writes *.safetensors",
        )
    if ggufs := [name for name in names if name.endswith(".gguf")]:
        raise CheckpointError(f"{folder} is a GGUF folder: its files are models", f"give one: {folder / ggufs[0]}")
    if any(folder.glob("*.safetensors.tmp")) or "progress.json" in names:
        raise CheckpointError(f"{folder} is an unfinished output", "run the same quantize command again to finish it")
    parts = sorted(path.parent.name for path in folder.glob("*/*.safetensors") if not path.parent.name.startswith("."))
    if parts := list(dict.fromkeys(parts)):
        raise CheckpointError(
            f"{folder} has no *.safetensors file of its own: it is a folder of models, {', '.join(parts)}",
            f"give one of them: {folder / parts[0]}",
        )
    raise CheckpointError(f"{folder} has no *.safetensors file", "give a Hugging Face model folder")


def _side_files(folder: Path, weights: set[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Side files, and what is left out, of a folder whose own shards and index are `weights`.

    Both are relative names, '/'-separated, sorted. Config and ledger are neither: an output has its own. Raises
    CheckpointError for more than `MAX_SIDE_FILES`, and for a link out of the folder.
    """
    modules = _sentence_transformer_modules(folder)
    side: list[str] = []
    left_out: list[str] = []
    records = (CONFIG, LEDGER, RUN, *(MEASURED if (folder / LEDGER).is_file() else ()))
    for name in _walk(folder, modules):
        if name in weights or name in records:
            continue
        part_of_model = name.rpartition("/")[0] in modules
        foreign = name.endswith(("/", *OTHER_WEIGHTS)) or _TRAINING_RECORDS.fullmatch(name.rpartition("/")[2])
        (left_out if foreign and not part_of_model else side).append(name)
        if len(side) > MAX_SIDE_FILES:
            raise CheckpointError(
                f"{folder} has more than {MAX_SIDE_FILES} files beside its weights", "is it a model folder?"
            )
    for name in side:
        _check_link(folder, name)
    return tuple(side), tuple(left_out)


def _walk(folder: Path, modules: set[str]) -> Iterator[str]:
    """Names of all regular, visible files under `folder`, '/'-separated, sorted within each folder.

    Hidden names, temporary ones and other indexes are left out. A sub-folder that is a model of its own is one name,
    which ends in "/"; those that are `modules` of this model are not. Links to folders raise CheckpointError: they
    could make a walk endless, or lead anywhere.
    """
    for parent, folders, files in os.walk(folder):
        here = Path(parent).relative_to(folder)
        visible = sorted(name for name in folders if not name.startswith(".") and not name.endswith(".partial"))
        folders[:] = []
        for name in visible:
            path, relative = Path(parent) / name, (here / name).as_posix()
            if path.is_symlink():
                raise CheckpointError(f"{path} is a link to a folder", "replace the link by the folder itself")
            if relative not in modules and _is_model(path):
                yield f"{relative}/"
            else:
                folders.append(name)
        for name in sorted(files):
            path = Path(parent) / name
            temporary = name.endswith((".tmp", ".incomplete", ".lock", ".safetensors.index.json"))
            if not name.startswith(".") and not temporary and path.is_file():
                yield (here / name).as_posix()


def _is_model(folder: Path) -> bool:
    """Whether a sub-folder is a model, an adapter or a trainer's checkpoint of its own: weights with a file that says
    what they are, or a folder that spicerack wrote."""
    names = next(os.walk(folder), ("", [], []))[2]  # nothing of a folder that may not be read
    weights = any(name.endswith((*OTHER_WEIGHTS, ".safetensors.index.json")) for name in names)
    return LEDGER in names or (weights and any(mark in names for mark in _MARKS))


def _check_link(folder: Path, name: str) -> None:
    """Raise CheckpointError for a side file that is a link out of the folder and of the hub's cache of it.

    name: relative to `folder`. A snapshot of the hub is all links into `blobs` of the same model, which are its own
    bytes.
    """
    path = folder / name
    if not path.is_symlink():
        return
    target = path.resolve()
    roots = [folder]
    if folder.parent.name == "snapshots":  # models--org--name/snapshots/<revision>, with the bytes in ../../blobs
        roots.append(folder.parent.parent / "blobs")
    if not any(target.is_relative_to(root) for root in roots):
        raise CheckpointError(
            f"{path} is a link to {target}, outside the model folder", "replace the link by a copy of the file"
        )


def _sentence_transformer_modules(folder: Path) -> set[str]:
    """Sub-folders that sentence-transformers loads (modules.json): weights in them, 2_Dense's say, are side files."""
    path = folder / "modules.json"
    if not path.is_file() or path.stat().st_size > MAX_CONFIG_BYTES:
        return set()
    try:
        modules = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}", "fetch the file again") from error
    paths = [module.get("path") for module in modules if isinstance(module, dict)] if isinstance(modules, list) else []
    return {path for path in paths if isinstance(path, str) and path}
