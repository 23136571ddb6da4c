"""`Engine`: what another program computes exactly, as data; one file each in `engines/`, each rule with its source.

An engine reads files of some formats (`Reads`). What a format holds, the format says; what an engine makes of it may be
less, and that is said here (`Limit`, `Tie`), so that it is known before hours are spent, and not when the engine does
not load, or speaks nonsense. Exact means that the weights that the engine multiplies with are those that our codes
stand for; how it rounds what flows through layers is its own affair.

What nobody here writes yet (graphs of ONNX, programs of ExecuTorch) is listed too, so that codes can be chosen for it.
What follows from the rules for a model is told by `storage.exactness`; here is data, without torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from spicerack import plugins
from spicerack.errors import UsageError
from spicerack.numerics.scheme import FloatType, Scheme

if TYPE_CHECKING:
    from spicerack.storage.format import StoredTensor

PACKAGE = "storage.engines"
TieKind = Literal["inputs", "experts", "projections"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """One rule: what an engine computes of what the format holds. What is None is not limited.

    source       where it is written: project, version, file
    roles        layers of these roles may be quantized, others stay float (roles of `models.census`)
    but          modules, by the last part of their names, that stay float whatever their role is
    schemes      schemes by name that are computed, whatever the other fields say
    integers     codes must be integers of the full range, times a float scale
    bits         widths of codes
    groups       columns that share a scale; None among them: a row
    zero         widths that may have zero points; None: all, (): none
    activations  what may be rounded to int8 on the way in ("token", "static"); (): nothing
    scales       the type that scales of groups must have
    multiple     rows and columns come in multiples of these
    """

    source: str
    roles: frozenset[str] | None = None
    but: tuple[str, ...] = ()
    schemes: tuple[str, ...] = ()
    integers: bool = False
    bits: tuple[int, ...] | None = None
    groups: tuple[int | None, ...] | None = None
    zero: tuple[int, ...] | None = None
    activations: tuple[str, ...] | None = None
    scales: FloatType | None = None
    multiple: tuple[int, int] = (1, 1)

    def obstacle(self, stored: StoredTensor) -> str | None:
        """Why the rule speaks against a tensor, as the end of "ENGINE computes no"; None if it does not."""
        if self.keeps_float(stored):
            return f"quantized {stored.role}"
        scheme = stored.scheme
        if scheme.name in self.schemes:
            return None
        return self._numbers(scheme) or self._grouping(stored)

    def keeps_float(self, stored: StoredTensor) -> bool:
        """Whether the layer stays float, whatever the scheme."""
        return (self.roles is not None and stored.role not in self.roles) or stored.module.rsplit(".", 1)[
            -1
        ] in self.but

    def _numbers(self, scheme: Scheme) -> str | None:
        """What speaks against levels, widths and zero points."""
        levels, top = scheme.levels.integers, 2 ** (scheme.bits - 1)
        if self.integers and (levels is None or levels.half or (levels.lo, levels.hi) != (-top, top - 1)):
            return f"levels of {scheme}"
        if self.integers and scheme.plain_obstacle is not None:
            return f"scales like those of {scheme}"
        if self.bits is not None and scheme.bits not in self.bits:
            return f"{scheme.bits} bits ({scheme}), only {_either(self.bits)}"
        if self.zero is not None and scheme.zero and scheme.bits not in self.zero:
            return f"zero points in {scheme.bits} bits ({scheme})" + (
                f", only in {_either(self.zero)}" if self.zero else ""
            )
        if self.activations is not None and scheme.activations not in (None, *self.activations):
            return f"activations like those of {scheme}"
        return None

    def _grouping(self, stored: StoredTensor) -> str | None:
        """What speaks against groups, their scales, and the shape."""
        scheme, (rows, columns) = stored.scheme, stored.shape[-2:]
        if self.groups is not None and scheme.group_columns not in self.groups:
            return f"groups of {scheme.group_columns or 'a row'} ({scheme}), only {_either(self.groups)}"
        if self.scales is not None and scheme.group_columns is not None and _scales(stored) != self.scales:
            return f"{_scales(stored)} scales of groups ({scheme}), only {self.scales}"
        if rows % self.multiple[0] or columns % self.multiple[1]:
            return (
                f"[{rows}, {columns}] weights, only multiples of {self.multiple[0]} rows and {self.multiple[1]} columns"
            )
        return None


def _scales(stored: StoredTensor) -> str:
    """The type of a tensor's scales, "source" as `numerics.scales.dtype_of` has it."""
    if stored.scheme.scale == "source":
        return "bfloat16" if str(stored.source_dtype) == "torch.bfloat16" else "float16"
    return str(stored.scheme.scale)


def _either(values: Sequence[int | None]) -> str:
    """Words for a list: 32, 64 or a row."""
    words = ["a row" if value is None else str(value) for value in values]
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


@dataclass(frozen=True, slots=True)
class Tie:
    """Layers that an engine makes one matrix of, so that they need one scheme, or all stay float.

    kind    "inputs": those that read the same input, q, k and v, or gate and up; "experts": all of a layer's experts;
            "projections": of a layer's experts those with one name
    source  where it is written
    """

    kind: TieKind
    source: str

    def groups(self, modules: Sequence[str], shared: Sequence[Sequence[str]]) -> list[list[str]]:
        """Those of `modules` that are tied. shared: those that read the same input, of the census."""
        if self.kind == "inputs":
            known = set(modules)
            return [group for one in shared if len(group := [module for module in one if module in known]) > 1]
        groups: dict[str, list[str]] = {}
        for module in modules:
            parts = module.split(".")
            if "experts" in parts[:-1]:
                prefix = ".".join(parts[: parts.index("experts")])
                groups.setdefault(prefix + (f".{parts[-1]}" if self.kind == "projections" else ""), []).append(module)
        return [group for group in groups.values() if len(group) > 1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reads:
    """Files of one kind that an engine reads.

    to        what `export --to` calls them
    written   whether anybody here writes them
    limits    what the engine computes, where that is less than files hold
    families  `model_type` of those whose files it reads: names, or a package of plug-ins with these names; None: all
              that the engine has
    loaded    families of which a model was loaded here from such a file; None: of all
    refused   families that it does not load as such files are written here, and why, a sentence without its end
    rehearsed whether transformers' own loading says what it reads of them (`Format.reading`)
    needs     what must be installed beside the engine; "" for nothing
    checked   how it is known: what ran here, or whose source was read
    remark    what a person should know who goes this way
    """

    to: str
    checked: str
    written: bool = True
    limits: tuple[Limit, ...] = ()
    families: tuple[str, ...] | str | None = None
    loaded: frozenset[str] | None = None
    refused: tuple[tuple[str, str], ...] = ()
    rehearsed: bool = False
    needs: str = ""
    remark: str = ""

    @property
    def known(self) -> tuple[str, ...] | None:
        """The families by name; None where there is no list."""
        return plugins.names(self.families) if isinstance(self.families, str) else self.families

    def family_obstacle(self, engine: str, model_type: object) -> str | None:
        """Why models of a family are not read, as a sentence; None if they are, or nobody says which."""
        if (reason := dict(self.refused).get(str(model_type))) is not None:
            return reason
        if self.known is None or model_type in self.known:
            return None
        return f"{engine} does not read the family {model_type!r} as {self.to}"

    def doubt(self, engine: str, model_type: object) -> str | None:
        """What a person should know of a family without an obstacle that was never loaded here, as a sentence."""
        if self.loaded is None or model_type in self.loaded:
            return None
        return (
            f"{engine} has the family {model_type!r}, and no model of it was loaded here: export asks {engine} itself "
            f"where it is installed"
        )

    @property
    def format(self) -> str:
        """The plug-in of `formats` behind it."""
        return self.to.replace("-", "_")


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Why an engine does not compute a layer exactly in its scheme.

    module   the layer
    rule     a sentence that begins with the layer
    nearest  the scheme that it could have; None where it stays float whatever the scheme is
    source   where the rule is written
    """

    module: str
    rule: str
    nearest: Scheme | None
    source: str

    def __str__(self) -> str:
        return self.rule + (f" (nearest: {self.nearest})" if self.nearest is not None else " (it stays float there)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """A program that runs models.

    name       what `--for` calls it
    version    that was looked at
    reads      the kinds of files, that which is recommended first
    ties       layers that need one scheme
    fallbacks  a scheme, and what the engine's own quantizer takes where rows are no whole blocks of it
    usual      schemes that people have there
    """

    name: str
    version: str
    reads: tuple[Reads, ...]
    ties: tuple[Tie, ...] = ()
    fallbacks: tuple[tuple[str, str], ...] = ()
    usual: tuple[str, ...] = ()

    def fallback(self, scheme: Scheme) -> str | None:
        """What the engine's own quantizer takes where rows are no whole blocks of a scheme; None where that is not
        known."""
        return dict(self.fallbacks).get(scheme.name)

    def reading(self, to: str, model_type: object) -> Reads:
        """Files that are called `to`, for models of a family. Raises UsageError for what the engine does not read."""
        for way in self.reads:
            if way.to == to:
                if (reason := way.family_obstacle(self.name, model_type)) is not None:
                    raise UsageError(reason, "another engine may have the family: spicerack formats MODEL")
                return way
        raise UsageError(f"{self.name} does not read {to}", f"it reads {', '.join(way.to for way in self.reads)}")


def names() -> list[str]:
    """What `--for` takes, sorted."""
    return sorted(engine.name for engine in every())


def every() -> list[Engine]:
    """All engines, by the names of their files."""
    return [plugins.get(PACKAGE, name, "ENGINE") for name in plugins.names(PACKAGE)]


def plain(name: str) -> str:
    """An engine's name as names are compared: case, dots and hyphens count for nothing, and a program around an engine
    is the engine inside. Whoever takes engines by name asks this, so that all take the same words."""
    word = re.sub(r"[^a-z0-9]", "", name.lower())
    return _OTHERS.get(word, word)


def find(name: str) -> Engine:
    """The engine that is called `name`, by `plain`. Raises UsageError with all names."""
    wanted = plain(name)
    for engine in every():
        if plain(engine.name) == wanted:
            return engine
    if wanted == _OURS:
        raise UsageError(f"{name} computes every scheme: there is nothing to limit", "leave it out")
    raise UsageError(f"no engine is known as {name!r}", f"one of {', '.join(names())}")


_OURS = "spicerack"
_OTHERS = {"ollama": "llamacpp", "lmstudio": "llamacpp", "mlxlm": "mlx", "hf": "transformers", "ort": "onnxruntime"}
"""Programs around an engine, and short names -> the engine."""
