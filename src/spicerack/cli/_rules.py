"""--set and --skip: options of every command that takes a scheme, whose order counts.

A rule names tensors by a pattern and gives them another scheme, or none; where two rules match, the later one wins. So
`--set '**.down_proj=w8' --skip 'model.layers.0.**'` is not the same as the two the other way round.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from spicerack.quantization.recipe import Rule

_ORDER = "spicerack.rule_order"
"""Where a context remembers it."""

set_option = click.option(
    "--set", "set_", multiple=True, metavar="PATTERN=SCHEME", help="Another scheme for some tensors; repeatable."
)
skip_option = click.option("--skip", multiple=True, metavar="PATTERN", help="Keep some tensors in float; repeatable.")


class OrderedCommand(click.Command):
    """Remembers in which order --set and --skip came: later rules win.

    click hands each option its own values, in order, and forgets how those of two options were mixed; so the command
    line is parsed once more, for the order alone.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click's, with the order kept in the context."""
        _, _, order = self.make_parser(ctx).parse_args(list(args))
        ctx.meta[_ORDER] = [param.name for param in order if param.name in ("set_", "skip")]
        return super().parse_args(ctx, args)


def renamed(schemes: Iterable[str | None]) -> tuple[str, ...]:
    """A sentence for each scheme that was typed by a name that others have for it: "int4 is w4g128 here".

    schemes: as typed, or rules PATTERN=SCHEME; None for none. Raises SchemeError for those that there are not.
    """
    from spicerack.numerics.scheme import parse

    typed = dict.fromkeys(text.rpartition("=")[2].strip() for text in schemes if text)
    names = {name: parse(name).name for name in typed if name and name != "skip"}
    return tuple(f"{name} is {ours} here" for name, ours in names.items() if name.lower() != ours)


def of(ctx: click.Context, set_: tuple[str, ...], skip: tuple[str, ...]) -> list[Rule]:
    """The rules that were typed, in the order in which they were given.

    ctx: of an `OrderedCommand`, which remembers the order. set_, skip: the values of the two options, as click has
    them. Raises RecipeError for a rule without "=", SchemeError for a scheme that there is not.
    """
    from spicerack.quantization import recipe

    values = {"set_": iter(set_), "skip": iter(skip)}
    make = {"set_": recipe.rule, "skip": recipe.skip}
    return [make[name](next(values[name])) for name in ctx.meta[_ORDER]]
