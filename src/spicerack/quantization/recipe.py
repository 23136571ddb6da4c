"""Which tensor gets which scheme: ordered rules, glob -> scheme, later rules win.

A glob matches the checkpoint's name without `.weight`. `*` stays within one component, `**` crosses, and `**.` may be
nothing at all:

    model.layers.*.mlp.down_proj=w8        every down projection
    model.layers.{0,31}.**=w8              everything in the first and the last of 32 blocks
    lm_head=skip                           stays in float

Linear layers (Conv1D and experts among them) get the recipe's scheme. Embeddings, heads and routers stay in float
unless a rule names them; a rule whose last component is `*` or `**` means "all layers here" and does not name them. A
tied head and embedding is one tensor: a rule on either name applies to it.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from spicerack import plugins
from spicerack.algorithms import method
from spicerack.algorithms.method import Method
from spicerack.errors import RecipeError, SchemeError
from spicerack.models.census import BY_DEFAULT, ON_REQUEST
from spicerack.numerics.scheme import Scheme, parse
from spicerack.storage import engine as engines
from spicerack.storage.files import local

Range = Literal["absmax", "opt"]
"""How scales are chosen: by the largest weight of a group, or by the least error."""
RANGES: tuple[Range, ...] = ("opt", "absmax")
OBSERVER = "percentile"
"""Where a recipe names none: the best measured (docs/quantization/quality.md)."""
SKIP = "skip"
"""What stands for no scheme in a rule: the tensor stays in float."""
_MAX_BYTES = 1 << 20
"""Of a recipe's file, which is read whole."""
_LONGEST = 500
"""Characters of a pattern: no tensor's path is nearly as long."""
_MOST_STARS = 4
"""`**` in a pattern: what a regular expression tries grows with the name's length to the power of their number."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Tensors that a pattern matches get a scheme.

    pattern   a glob of checkpoint names without `.weight`, see the module
    scheme    None keeps the tensors in float
    """

    pattern: str
    scheme: Scheme | None

    @property
    def names_last(self) -> bool:
        """Whether the last component is more than a bare wildcard."""
        return self.pattern.rsplit(".", 1)[-1] not in ("*", "**")

    def matches(self, module: str) -> bool:
        """Whether the pattern matches the whole of a module's name."""
        return _compile(self.pattern).fullmatch(module) is not None

    def __str__(self) -> str:
        return f"{self.pattern}={self.scheme.name if self.scheme else SKIP}"


@dataclass(frozen=True, slots=True)
class Recipe:
    """The scheme of all linear layers, the exceptions, and how ranges and codes are chosen.

    scheme     of what is quantized by default
    range_     how scales are chosen
    rules      exceptions, in order: later ones win
    method     how codes are chosen; None is the best measured for the scheme where there is calibration text, else rtn
    observer   how static scales of activations are found; None is the best measured, and where there are none
    fit_groups layers that no whole groups tile get the nearest scheme that fits (`fitting.py`), and are not refused
    for_       the engine that must compute all of it exactly (`storage.engine`); None: whoever can
    """

    scheme: Scheme
    range_: Range = "opt"
    rules: tuple[Rule, ...] = ()
    method: Method | None = None
    observer: str | None = None
    fit_groups: bool = False
    for_: str | None = None

    @property
    def is_static(self) -> bool:
        """Whether some scheme has static activations."""
        schemes = (self.scheme, *(r.scheme for r in self.rules))
        return any(s is not None and s.activations == "static" for s in schemes)

    def as_dict(self) -> dict[str, Any]:
        """What is printed and stored; `read` of its YAML gives the recipe back."""
        rules = [{rule.pattern: rule.scheme.name if rule.scheme else SKIP} for rule in self.rules]
        method = {} if self.method is None else {"method": str(self.method)}
        observer = {} if self.observer is None else {"observer": self.observer}
        fit = {"fit_groups": True} if self.fit_groups else {}
        engine = {} if self.for_ is None else {"for": self.for_}
        return {"scheme": self.scheme.name, **method, "range": self.range_, **observer, **fit, **engine, "rules": rules}

    def with_choices(
        self,
        range_: str | None,
        method_: str | Method | None,
        observer: str | None,
        fit_groups: bool | None = None,
        for_: str | None = None,
    ) -> Recipe:
        """This recipe with other ways to choose ranges, codes, static scales and what fits narrow layers, or for an
        engine; None leaves what it has.

        Raises RecipeError for a name that there is not.
        """
        return dataclasses.replace(
            self,
            range_=self.range_ if range_ is None else check_range(range_),
            method=(method.parse(method_) if isinstance(method_, str) else method_) or self.method,
            observer=self.observer if observer is None else check_observer(observer),
            fit_groups=self.fit_groups if fit_groups is None else fit_groups,
            for_=self.for_ if for_ is None else engines.find(for_).name,
        )

    def then(self, rules: Iterable[Rule]) -> Recipe:
        """This recipe with more rules, which win over the present ones."""
        return dataclasses.replace(self, rules=(*self.rules, *rules))

    def __str__(self) -> str:
        method = [] if self.method is None else [str(self.method)]
        observer = [] if self.observer is None else [f"observer={self.observer}"]
        fit = ["fit-groups"] if self.fit_groups else []
        engine = [] if self.for_ is None else [f"for={self.for_}"]
        rules = map(str, self.rules)
        return " ".join([self.scheme.name, *method, f"range={self.range_}", *observer, *fit, *engine, *rules])


def of(scheme: str | Scheme | Recipe, rules: Iterable[str | Rule] = ()) -> Recipe:
    """What functions are given, as a recipe: a scheme, by name or not, or a recipe, and more rules.

    Raises SchemeError, RecipeError.
    """
    base = scheme if isinstance(scheme, Recipe) else Recipe(parse(scheme) if isinstance(scheme, str) else scheme)
    return base.then(rule(r) if isinstance(r, str) else r for r in rules)


def decided(chosen: Recipe, with_text: bool, effort: str = "normal") -> Recipe:
    """The recipe with its method and observer decided, by what was measured to be best where it names none.

    chosen: as asked for. with_text: whether there is calibration text; without it the method is rounding to nearest.
    effort: what may be spent where no method is named, see `method.auto`. Raises RecipeError or SchemeError if they
    need such a text and there is none, or an observer or an effort has no use.
    """
    if method.check_effort(effort) == "high" and (chosen.method is not None or not with_text):
        where = f"the method is {chosen.method}" if chosen.method else "there is no calibration text"
        raise RecipeError(f"effort high: {where}, and nothing is left to choose", "leave one of them out")
    how = chosen.method or method.auto(chosen.scheme, with_text, method.check_effort(effort))
    if not with_text and how.needs_text:
        raise RecipeError(f"{how} needs calibration text", "pass --calib FILE (calibration=...), or --method rtn")
    if chosen.is_static and not with_text:
        raise SchemeError(
            "static activation scales (a8s) need calibration text", "pass --calib FILE (calibration=...), or use a8"
        )
    if chosen.observer is not None and not chosen.is_static:
        raise RecipeError(f"observer {chosen.observer}: no scheme has static activations", "use a8s, such as w8a8s")
    observer = (chosen.observer or OBSERVER) if chosen.is_static else None
    return dataclasses.replace(chosen, method=how, observer=observer)


@dataclass(frozen=True, slots=True)
class Decision:
    """What happens to one tensor.

    scheme   what it is quantized to; None keeps it in float
    why      the rule or the reason, for the ledger and for people
    rule     that decided; None: the recipe's scheme, or its role
    refused  what was asked for, where the tensor cannot have it and stays in float; `why` is then the reason
    """

    scheme: Scheme | None
    why: str
    rule: Rule | None = None
    refused: Scheme | None = None

    def kept(self, why: str) -> Decision:
        """The same tensor left in float for this reason, whatever was asked for."""
        return Decision(None, why, self.rule, self.scheme)


def _compile(pattern: str) -> re.Pattern[str]:
    """The regular expression of a glob: `*` and `?` stay within a component, `**` crosses dots, `{a,b}` is either;
    everything else stands for itself. Components in front of something (`**.`) may be none at all."""
    pieces = re.split(r"((?:(?<=^)|(?<=\.))\*\*\.|\*\*|\*|\?|\{[^{}]*\})", pattern)
    translated = {"**.": r"(?:.*\.)?", "**": ".*", "*": "[^.]*", "?": "[^.]"}
    parts = [
        f"(?:{'|'.join(map(re.escape, piece[1:-1].split(',')))})" if piece.startswith("{") and piece.endswith("}")
        else translated.get(piece, re.escape(piece))
        for piece in pieces
    ]  # fmt: skip
    return re.compile("".join(parts))


def rule(text: str) -> Rule:
    """`PATTERN=SCHEME` -> Rule; `skip` is a scheme here, and means float.

    Raises RecipeError for a text without both, and for patterns that could take too long; SchemeError for a scheme that
    there is not.
    """
    pattern, equals, scheme = text.partition("=")
    if not equals or not pattern.strip() or not scheme.strip():
        raise RecipeError(f"rule {text!r} is not PATTERN=SCHEME", "for example 'model.layers.*.mlp.down_proj=w8'")
    return _rule(pattern.strip(), scheme.strip())


def skip(pattern: str) -> Rule:
    """The rule that keeps what `pattern` matches in float."""
    return _rule(pattern, SKIP)


def _rule(pattern: str, scheme: str) -> Rule:
    """A rule of a pattern and the name of a scheme, or SKIP, both without margins.

    Raises RecipeError for more than `_LONGEST` characters or `_MOST_STARS` `**`, which a stranger's recipe could stall
    on, and for a pattern that ends in `.weight`, which would match nothing.
    """
    if len(pattern) > _LONGEST or pattern.count("**") > _MOST_STARS:
        raise RecipeError(f"pattern {pattern[:60]!r} is too long or has more than four '**'", "write several rules")
    if pattern.endswith(".weight"):
        raise RecipeError(f"pattern {pattern!r} ends in .weight", f"patterns match names without it: {pattern[:-7]!r}")
    return Rule(pattern, None if scheme == SKIP else parse(scheme))


def read(path: Path) -> Recipe:
    """A YAML recipe: `scheme`; optional `method`, `range`, `observer`, `fit_groups`, `for`; `rules`, a list of
    `pattern: scheme` (or skip).

    Raises RecipeError naming file and key.
    """
    import yaml

    path = local(path)
    if not path.is_file():
        raise RecipeError(f"recipe {path} is not a file", "give the path of a YAML file")
    if path.stat().st_size > _MAX_BYTES:
        raise RecipeError(f"recipe {path} has more than {_MAX_BYTES} bytes", "a recipe is a page, not a book")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"recipe {path} is not YAML: {error}", "see docs/quantization/recipes.md for an example"
        ) from error
    if not isinstance(data, dict) or not isinstance(data.get("scheme"), str):
        raise RecipeError(f"recipe {path} has no 'scheme'", "begin with, say, 'scheme: w4g128'")
    unknown = set(data) - {"scheme", "method", "range", "observer", "fit_groups", "for", "rules"}
    if unknown:
        raise RecipeError(
            f"recipe {path}: unknown key {sorted(map(str, unknown))[0]!r}",
            "keys are scheme, method, range, observer, fit_groups, for, rules",
        )
    rules = data.get("rules") or []
    if not isinstance(rules, list):
        raise RecipeError(f"recipe {path}: 'rules' is not a list", "write '- pattern: scheme' lines")
    parsed = []
    for item in rules:
        pair = next(iter(item.items())) if isinstance(item, dict) and len(item) == 1 else (None, None)
        if not isinstance(pair[0], str) or not isinstance(pair[1], str):
            raise RecipeError(f"recipe {path}: rule {item!r} is not 'pattern: scheme'", "one pattern per list entry")
        parsed.append(_rule(*pair))
    how = method.parse(str(data["method"])) if "method" in data else None
    observer = check_observer(str(data["observer"])) if "observer" in data else None
    fit = data.get("fit_groups", False)
    if not isinstance(fit, bool):
        raise RecipeError(f"recipe {path}: 'fit_groups' is {fit!r}", "write true or false")
    range_ = check_range(str(data.get("range", "opt")))
    engine = engines.find(str(data["for"])).name if "for" in data else None
    return Recipe(parse(data["scheme"]), range_, tuple(parsed), how, observer, fit, engine)


def check_range(text: str) -> Range:
    """`text` as a range method. Raises RecipeError."""
    for known in RANGES:
        if text == known:
            return known
    raise RecipeError(f"unknown range {text!r}", f"one of {', '.join(RANGES)}")


def check_observer(text: str) -> str:
    """`text` as an observer's name. Raises RecipeError."""
    known = plugins.names("quantization.calibration.observers")
    if text not in known:
        raise RecipeError(f"unknown observer {text!r}", f"one of {', '.join(known)}")
    return text


def resolve(recipe: Recipe, roles: Mapping[str, str], tied: Mapping[str, str]) -> dict[str, Decision]:
    """A Decision for every module of `roles` (checkpoint name without `.weight` -> role).

    tied: alias -> owner, both without `.weight`; aliases may be absent from `roles`. Raises RecipeError for a rule that
    matches nothing, or nothing that can be quantized.
    """
    aliases: dict[str, list[str]] = {}
    for alias, owner in tied.items():
        aliases.setdefault(owner, []).append(alias)
    used: set[Rule] = set()
    decisions: dict[str, Decision] = {}
    for module, role in roles.items():
        if module in tied:
            continue
        names = [module, *aliases.get(module, [])]
        hits = [r for r in recipe.rules if any(r.matches(name) for name in names) and _reaches(r, role)]
        used.update(hits)
        if hits:
            decisions[module] = Decision(hits[-1].scheme, f"rule {hits[-1]}", hits[-1])
        elif role in BY_DEFAULT:
            decisions[module] = Decision(recipe.scheme, "recipe")
        else:
            decisions[module] = Decision(
                None, f"{role}: stays in float unless a rule names it" if role in ON_REQUEST else role
            )
    for unused in (r for r in recipe.rules if r not in used):
        raise RecipeError(f"rule {unused} matches nothing that it could change", _nearest(unused, [*roles, *tied]))
    return {**decisions, **{alias: decisions[owner] for alias, owner in tied.items() if owner in decisions}}


def refuse_vain(recipe: Recipe, decisions: Mapping[str, Decision]) -> None:
    """Raise RecipeError for a rule that asks for a scheme where no tensor that it decides about can have one.

    decisions: module -> what becomes of it, once all that forbids a scheme was asked. The reason is that of the first.
    """
    for rule in recipe.rules:
        mine = {module: d for module, d in decisions.items() if d.rule == rule and (d.scheme or d.refused)}
        if mine and all(decision.scheme is None for decision in mine.values()):
            module, decision = next(iter(mine.items()))
            others = f" (and {len(mine) - 1} more)" if len(mine) > 1 else ""
            raise RecipeError(
                f"rule {rule}: {module or 'the layer'} stays in float{others}: {decision.why}", "leave the rule out"
            )


def partly_vain(recipe: Recipe, decisions: Mapping[str, Decision]) -> Iterator[str]:
    """A sentence for each rule that some of the tensors it decides about cannot follow, with the first's reason."""
    for rule in recipe.rules:
        mine = {module: d for module, d in decisions.items() if d.rule == rule and (d.scheme or d.refused)}
        kept = {module: decision for module, decision in mine.items() if decision.scheme is None}
        if kept and len(kept) < len(mine):
            module, decision = next(iter(kept.items()))
            yield f"rule {rule}: {len(kept)} of {len(mine)} layers stay in float, such as {module}: {decision.why}"


def _reaches(rule: Rule, role: str) -> bool:
    """Whether a rule that matches a tensor of this role decides about it: heads and tables must be named, see the
    module."""
    return rule.scheme is None or role in BY_DEFAULT or (role in ON_REQUEST and rule.names_last)


def _nearest(rule: Rule, modules: Sequence[str]) -> str:
    """The hint for a rule that decides nothing: what it matches that it cannot change, or names like it."""
    if any(rule.matches(module) for module in modules):
        return "it matches only tensors that no scheme applies to, or embeddings and heads that it must name"
    near = difflib.get_close_matches(rule.pattern, modules, n=2, cutoff=0.3)
    return "names look like " + ", ".join(near or list(modules)[:2])
