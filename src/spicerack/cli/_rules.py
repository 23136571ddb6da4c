"""--set and --skip: options of every command that takes a scheme, whose order counts."""

from __future__ import annotations

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


def of(ctx: click.Context, set_: tuple[str, ...], skip: tuple[str, ...]) -> list[Rule]:
    """The rules, in the order in which they were given. ctx: of an `OrderedCommand`; set_, skip: their values."""
    from spicerack.quantization import recipe

    values = {"set_": iter(set_), "skip": iter(skip)}
    make = {"set_": recipe.rule, "skip": recipe.skip}
    return [make[name](next(values[name])) for name in ctx.meta[_ORDER]]
