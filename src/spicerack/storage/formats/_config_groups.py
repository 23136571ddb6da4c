"""What config.json says of a compressed-tensors folder: `quantization_config`, written and read.

    section   schemes of modules -> the section: a group for each scheme, and patterns of the modules that it matches
    groups    the same as data, of which `decodable` and `experts_agree` tell what transformers makes
    schemes   the section of a folder -> its schemes

A group names its modules by what compressed-tensors calls targets: a class, a module's path, or `re:` and a regular
expression that is matched against paths. Written are few of them: one for a kind of layer, in all blocks at once, where
that matches no module too many. Reading looks at the numbers of a group and never at its targets: which modules it
means is told by the tensors' shapes, so that a regular expression in a stranger's config is never run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spicerack.errors import CheckpointError
from spicerack.numerics.scheme import Scheme, parse
from spicerack.storage.format import Contents, Reading
from spicerack.storage.reader import Checkpoint

PACKED, INTEGER = "pack-quantized", "int-quantized"
"""Layouts of `compressed_tensors`, as config.json calls them: codes as a stream of bits, and codes as int8."""
# What config.json says of int8 activations: a scale for each token, found as it comes, or a stored one for the tensor.
_INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "group_size": None, "observer": None}
_ACTIVATIONS: dict[str, dict[str, Any]] = {
    "token": {**_INT8, "strategy": "token", "dynamic": True},
    "static": {**_INT8, "strategy": "tensor", "dynamic": False},
}
ELSEWHERE = "load it with transformers"
"""The remedy for what others read and we do not."""
DAMAGED = "the folder is damaged, or in a variant of compressed-tensors that is not read"


@dataclass(frozen=True, slots=True)
class Group:
    """A group of `config_groups`: the scheme of some modules, and what they are called there.

    modules   of the checkpoint
    targets   what compressed-tensors matches its modules against
    """

    scheme: Scheme
    modules: tuple[str, ...]
    targets: tuple[str, ...]

    @property
    def singles_out_experts(self) -> bool:
        """Whether transformers takes it for the one of experts, if there are several groups."""
        return any(target.startswith("re:") and "experts" in target for target in self.targets)


def groups(contents: Contents, names: Reading) -> list[Group]:
    """A group for each scheme: first those of experts, because transformers takes the first that names some.

    contents: what is quantized; at least one module. names: of layers that stay float, which no target matches, and of
    those that are packed in transformers' model. One scheme is that of every linear layer but these.
    """
    members: dict[Scheme, list[str]] = {}
    for p in contents.values():
        members.setdefault(p.scheme, []).append(p.module)
    if len(members) == 1:
        [(scheme, modules)] = members.items()
        return [Group(scheme, tuple(modules), ("Linear",))]
    known = {module: list(dict.fromkeys((module, names.paths.get(module, module)))) for module in contents}
    everything = [*(name for called in known.values() for name in called), *names.floats]
    made = [
        Group(scheme, tuple(modules), tuple(_patterns([n for m in modules for n in known[m]], everything)))
        for scheme, modules in members.items()
    ]
    return sorted(made, key=lambda group: not any(is_expert(module) for module in group.modules))


def is_expert(module: str) -> bool:
    """Whether a module of a checkpoint is one expert's, which transformers stacks with the others while loading."""
    return "experts" in module.split(".")


def decodable(made: Sequence[Group]) -> bool:
    """Whether `dequantize` gives every module its own scheme: transformers takes one for all experts, and one for all
    other layers."""
    dense = next((g for g in made if not g.singles_out_experts), made[0])
    return experts_agree(made) and all(g is dense or is_expert(module) for g in made for module in g.modules)


def experts_agree(made: Sequence[Group]) -> bool:
    """Whether transformers finds the one scheme that it takes for all experts, and it is that of each."""
    named = next((g for g in made if g.singles_out_experts), None)
    first = named or next((g for g in made if any(not t.startswith("re:") for t in g.targets)), made[0])
    return all(g is first or not is_expert(module) for g in made for module in g.modules)


def is_encoder(config: Mapping[str, Any]) -> bool:
    """Whether config.json is of a model without a head: what sentence-transformers loads."""
    classes = config.get("architectures")
    return isinstance(classes, list) and any(
        str(name).endswith("Model") and "LMHead" not in str(name) for name in classes
    )


def section(method: str, contents: Contents, reading: Reading) -> dict[str, Any]:
    """`quantization_config` as config.json has it: a group of `config_groups` for each scheme.

    method: the format's name there. contents: what is quantized; at least one module. reading: layers that stay float
    are under `ignore`; `dequantize`, of transformers and nobody else, is there where it is told to decode.

    Several layouts in one folder are called mixed-precision.
    """
    made = groups(contents, reading)
    formats = {_format(group.scheme) for group in made}
    packed = [name for module in contents for name in (module, reading.paths.get(module, module))]
    quantization: dict[str, Any] = {
        "quant_method": method,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": _group(group.scheme, list(group.targets)) for i, group in enumerate(made)},
        "ignore": _patterns(reading.floats, [*packed, *reading.floats]),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    return quantization | ({"dequantize": True} if reading.decodes else {})


def _format(scheme: Scheme) -> str:
    """Which of the two layouts a scheme has."""
    return INTEGER if scheme.activations else PACKED


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    """An entry of `config_groups`: the scheme in the format's words, for the modules that `targets` match."""
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": not scheme.zero,
        "strategy": "group" if scheme.group_columns else "channel",
        "group_size": scheme.group_columns,
        "dynamic": False,
        "observer": "minmax",
    }
    activations = dict(_ACTIVATIONS[scheme.activations]) if scheme.activations else None
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": activations,
        "output_activations": None,
        "format": _format(scheme),
    }


def _patterns(modules: Sequence[str], everything: Sequence[str]) -> list[str]:
    """Targets that match exactly `modules` among `everything`: one for all layers of a kind where that is safe.

    Both are paths of modules. A path without a number, and one whose expression would match a module of `everything`
    that is not among `modules`, stands for itself.
    """
    mine = set(modules)
    others = {_expression(name) for name in everything if name not in mine}
    targets = (m if _expression(m) in others or not re.search(r"\d", m) else "re:" + _expression(m) for m in modules)
    return list(dict.fromkeys(targets))


def _expression(module: str) -> str:
    """A regular expression for the modules of that name in every layer: numbers match any number."""
    return "^" + r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in module.split(".")) + "$"


def schemes(checkpoint: Checkpoint) -> list[Scheme]:
    """The schemes of config.json's groups, each once, in their order.

    Raises CheckpointError for a section without groups, weights that are not compressed, and what `_scheme` refuses.
    """
    section = checkpoint.config["quantization_config"]
    groups = section.get("config_groups")
    if not isinstance(groups, dict) or section.get("quantization_status", "compressed") != "compressed":
        raise CheckpointError(f"{checkpoint.folder}: config.json has no config_groups of compressed weights", DAMAGED)
    where = f"{checkpoint.folder}: config group"
    return list(dict.fromkeys(_scheme(group, f"{where} {name}") for name, group in groups.items()))


def _scheme(group: Any, where: str) -> Scheme:
    """The scheme of one group of a stranger's config: integers of 2 to 8 bits, a scale for each group or each row.

    group: what JSON holds there, of whatever type. Raises CheckpointError, beginning with `where`, for floats, other
    widths and strategies (tensor, block), and activations other than int8 of a token or of a tensor, with w8 only.
    """
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict) or weights.get("type", "int") != "int" or weights.get("dynamic"):
        raise CheckpointError(f"{where} has no integer weights", ELSEWHERE)
    width, size, strategy = weights.get("num_bits"), weights.get("group_size"), weights.get("strategy")
    grouped = strategy == "group" or (strategy is None and type(size) is int and size > 0)
    if type(width) is not int or not 2 <= width <= 8 or (grouped and (type(size) is not int or size < 1)):
        raise CheckpointError(f"{where} has {width!r} bits and group size {size!r}", ELSEWHERE)
    if strategy not in ("group", "channel", None):
        raise CheckpointError(f"{where} has the strategy {strategy!r}", ELSEWHERE)
    name = f"w{width}" + (f"g{size}" if grouped else "") + ("" if weights.get("symmetric", True) else "z")
    activations = group.get("input_activations")
    if activations is None:
        return parse(name)
    kind, suffix = ("token", "a8") if activations.get("dynamic") else ("static", "a8s")
    wanted = _ACTIVATIONS[kind].items()
    if name != "w8" or any(activations.get(k, v) != v for k, v in wanted if k not in ("group_size", "observer")):
        raise CheckpointError(f"{where} has activations that are not read: {activations}", ELSEWHERE)
    return parse(name + suffix)
