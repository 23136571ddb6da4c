"""Native attention in transformers' models, unseen by the model's own code.

transformers looks a model's attention up by the name in its config, at each call. `forward` is entered under names of
ours when this is imported, which a pickle of any packed layer does, too; `use_native_attention` writes such a name into
the config of a model that would use torch's; the model keeps
its code, its masks and its caches. What the native kernel does not compute goes to the function that would have been
called. Given up: the last bits of a result are not torch's, because sums run in another order, and in float32 whatever
the type.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from spicerack.kernels import attention, panels
from spicerack.kernels.kernel import check_engine

NAME = "spicerack"
"""Of this attention in `config._attn_implementation`, with `_` and the engine behind it where one was named;
`model.set_attn_implementation("sdpa")` goes back to torch's."""


def use_native_attention(model: PreTrainedModel, engine: str | None = None) -> None:
    """Let `model` call `forward` below where it would call torch's attention.

    Its config is changed, and nothing else. A model that was asked for another attention keeps it, and so does one
    whose code asks whether the name is torch's (`asks_for_sdpa`), or of which transformers says that it cannot be set.

    model: of any family; one that has this attention already keeps it. engine: as in `kernels.attention`, None the
    fastest; each has a name of its own among transformers', so that it is this model's alone. Raises UsageError for one
    that this processor has not.
    """
    if model.config._attn_implementation != "sdpa" or not model._can_set_attn_implementation():
        return
    if any(asks_for_sdpa(file) for file in _files(model)):
        return
    check_engine(engine)
    model.set_attn_implementation(_name(engine))


def _files(model: nn.Module) -> set[str]:
    """Names of the Python modules that the classes in `model` and their bases are from: the family's code.

    torch's, ours and those of transformers that serve all families are left out.
    """
    classes = {cls for part in {type(module) for module in model.modules()} for cls in part.__mro__}
    files = {cls.__module__ for cls in classes}
    common = ("builtins", "abc", "typing", "torch", "spicerack", "transformers")
    return {f for f in files if f.startswith("transformers.models.") or f.split(".")[0] not in common}


@cache
def asks_for_sdpa(file: str) -> bool:
    """Whether the code of a Python module, by its name, compares anything with the name of torch's attention.

    A family that does so has code of its own for "sdpa" (a mask, a choice of tokens), which would be left out under
    another name. Code that cannot be read counts as such. Choosing a class by the name when a model is built, defaults
    of arguments and looking torch's function up are no comparisons.
    """
    try:
        source = inspect.getsource(sys.modules[file])
    except (KeyError, OSError, TypeError):
        return True
    return compares_with_sdpa(source)


def compares_with_sdpa(source: str) -> bool:
    """The same of the text of a Python file."""
    if not re.search(r"[\"']sdpa", source):  # to parse takes a tenth of a second
        return False
    nodes = list(ast.walk(ast.parse(source)))
    lists = {
        target.id
        for node in nodes if isinstance(node, ast.Assign) and _names_sdpa(node.value) for target in node.targets
        if isinstance(target, ast.Name) and not isinstance(node.value, ast.Constant | ast.Dict)
    }  # fmt: skip
    return any(_is_comparison(node, lists) for node in nodes)


def _is_comparison(node: ast.AST, lists: set[str]) -> bool:
    """Whether a node compares something with the name, itself or in one of the variables `lists`."""
    if isinstance(node, ast.Compare | ast.MatchValue):
        return _names_sdpa(node) or any(isinstance(n, ast.Name) and n.id in lists for n in ast.walk(node))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return node.func.attr in ("startswith", "endswith", "get") and any(map(_names_sdpa, node.args))
    return False


def _names_sdpa(node: ast.AST) -> bool:
    """Whether a string in an expression is, or begins with, the name of torch's attention."""
    return any(
        isinstance(n, ast.Constant) and isinstance(n.value, str) and n.value.startswith("sdpa") for n in ast.walk(node)
    )


def forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    engine: str | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers' `sdpa_attention_forward`, which gets what the native kernel does not do.

    That is: gradients, dropout, tracing, masks that are added, and head widths that are no multiple of 16.

    module           asked whether it is causal, if `is_causal` does not say
    query            [B, H, L, D]
    key, value       [B, G, S, D]: H / G heads of the query share one of these
    attention_mask   broadcast to [B, H, L, S]; of bools, False hides a key
    dropout          share of the weights that are dropped; only torch's does it
    scaling          of the products of queries and keys; None is D ** -0.5
    is_causal        whether query i sees keys 0..i only; None: as `module` says
    engine           as in `kernels.attention`

    Returns the attended values [B, L, H, D] in the query's type, and None for their weights, which are never there.
    """
    if (
        type(query) is torch.Tensor
        and not dropout
        and not torch.compiler.is_compiling()
        and not (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad))
        and others.get("position_bias") is None
        and others.get("softcap") is None
        and attention.obstacle(query, key, value, attention_mask) is None
    ):
        # Like torch's, causal only where there is no mask, and never for one query, which comes last.
        if is_causal is None:
            is_causal = bool(getattr(module, "is_causal", True))
        causal = is_causal and attention_mask is None and query.shape[2] > 1
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        attended = attention.attention(query, key, value, attention_mask, causal=causal, scale=scale, engine=engine)
        return attended, None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **others
    )


def _name(engine: str | None) -> str:
    return NAME if engine is None else f"{NAME}_{engine}"


for _engine in (None, *panels.NAMES):
    AttentionInterface.register(_name(_engine), forward if _engine is None else partial(forward, engine=_engine))
    AttentionMaskInterface.register(_name(_engine), sdpa_mask)
