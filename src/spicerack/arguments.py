"""Arguments of the face are looked at before anything else is: of the types that annotations name, or refused by name.

    @checked            a function, or __init__
    check_fields(self)  a dataclass, in its `__post_init__`

A value of another type would go wrong deep inside, in words about something else ("'NoneType' object has no attribute
'levels'"). Annotations are read when a function is first called. What they cannot say (ranges, words, files) is refused
by whoever knows it; what is no type here (protocols, type variables without bounds) passes.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import inspect
import os
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from spicerack.errors import UsageError

P = ParamSpec("P")
R = TypeVar("R")
_LONGEST = 60
"""Characters of a value that a message shows."""


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """The function, which raises UsageError for an argument that is of no type that its annotation names."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        hints, signature = _known(function)
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:  # Python's own words are as good: the call below says them
            given = {}
        _check(function.__qualname__.removesuffix(".__init__"), hints, given)
        return function(*args, **kwargs)

    return call


def check_fields(instance: Any) -> None:
    """Raise UsageError for a field of a dataclass's instance that is of no type that its annotation names."""
    cls = type(instance)
    given = {field.name: getattr(instance, field.name) for field in dataclasses.fields(cls)}
    _check(cls.__name__, get_type_hints(cls), given)


def at_least(low: int, **given: float | None) -> None:
    """Raise UsageError for the first of these numbers, by name, that is below `low`; None is no number."""
    for name, value in given.items():
        if value is not None and value < low:
            raise UsageError(f"{name} is {value}", f"use {low} or more")


@functools.cache
def _known(function: Callable[..., Any]) -> tuple[dict[str, Any], inspect.Signature]:
    return get_type_hints(inspect.unwrap(function)), inspect.signature(function)


def _check(owner: str, hints: dict[str, Any], given: dict[str, Any]) -> None:
    for name, value in given.items():
        if name in hints and not _fits(value, hints[name]):
            raise UsageError(
                f"{owner}: {name} is {_shown(value)}", f"pass {_listed(list(dict.fromkeys(_words(hints[name]))))}"
            )


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value may be what the annotation says; a sequence of words is never one word."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in get_args(hint))
    if origin is Literal:  # which of the words is known better where it is used
        return any(isinstance(value, type(one)) for one in get_args(hint))
    if origin is collections.abc.Callable:
        return callable(value)
    if isinstance(origin, type):
        if not isinstance(value, origin) or isinstance(value, str | bytes):
            return False
        inner = [one for one in get_args(hint) if one is not ...]
        if not isinstance(value, collections.abc.Collection) or len(inner) != 1 or inner == [Any]:
            return True  # an iterator is not used up to look at it
        return all(_fits(one, inner[0]) for one in value)
    if hint is Any:
        return True
    if isinstance(hint, TypeVar):
        return hint.__bound__ is None or _fits(value, hint.__bound__)
    if hint in (int, float):
        kinds = int if hint is int else int | float
        return not isinstance(value, bool) and (isinstance(value, kinds) or _is_number(value, hint))
    if hint is Path:
        return isinstance(value, os.PathLike)
    return value is None if hint in (None, types.NoneType) else not isinstance(hint, type) or isinstance(value, hint)


def _is_number(value: Any, hint: type) -> bool:
    """Whether numpy's number, say, can stand for Python's."""
    return hasattr(value, "__index__" if hint is int else "__float__") and getattr(value, "shape", None) == ()


def _words(hint: Any) -> Iterator[str]:
    """What an annotation names, for people."""
    if get_origin(hint) in (Union, types.UnionType):
        for one in get_args(hint):
            yield from _words(one)
    elif get_origin(hint) is Literal:
        yield from map(repr, get_args(hint))
    elif hint in (None, types.NoneType):
        yield "None"
    elif get_origin(hint) is collections.abc.Callable:
        yield "a function"
    elif isinstance(get_origin(hint), type):
        inner = [word for one in get_args(hint)[:1] for word in _words(one)]
        yield f"a list of {' or '.join(inner)}" if inner else "a list"
    elif isinstance(hint, TypeVar):
        yield from _words(hint.__bound__)
    else:
        yield hint.__name__ if isinstance(hint, type) else str(hint)


def _listed(words: list[str]) -> str:
    return " or ".join(words) if len(words) < 3 else f"{', '.join(words[:-1])} or {words[-1]}"


def _shown(value: Any) -> str:
    """A value as a message has it: what it is, or its type where that would be long."""
    text = repr(value) if isinstance(value, str | int | float | None | bool | bytes) else f"a {type(value).__name__}"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
