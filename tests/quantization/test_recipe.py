"""Recipes: globs, order, defaults, ties, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from spicerack.algorithms import method
from spicerack.errors import RecipeError, SchemeError
from spicerack.numerics.scheme import parse
from spicerack.quantization import run
from spicerack.quantization.recipe import Recipe, read, resolve, rule, skip

ROLES = {
    "model.embed_tokens": "embedding",
    **{f"model.layers.{i}.self_attn.{p}_proj": "linear" for i in range(3) for p in "qkvo"},
    **{f"model.layers.{i}.mlp.gate": "router" for i in range(3)},
    **{f"model.layers.{i}.mlp.down_proj": "linear" for i in range(3)},
    "model.norm": "norm",
}
TIED = {"lm_head": "model.embed_tokens"}
W4 = Recipe(parse("w4g128"))


def schemes(recipe: Recipe, tied: dict[str, str] | None = None) -> dict[str, str | None]:
    decisions = resolve(recipe, ROLES, TIED if tied is None else tied)
    return {module: d.scheme.name if d.scheme else None for module, d in decisions.items()}


def test_defaults_quantize_linear_layers_only() -> None:
    assert schemes(W4) == {
        m: "w4g128" if role == "linear" else None for m, role in {**ROLES, "lm_head": "head"}.items()
    }


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("model.layers.*.mlp.down_proj", "model.layers.10.mlp.down_proj", True),
        ("model.layers.*.down_proj", "model.layers.1.mlp.down_proj", False),
        ("model.layers.**.down_proj", "model.layers.1.mlp.down_proj", True),
        ("**", "model.layers.1.mlp.down_proj", True),
        ("**.head", "head", True),
        ("**.head", "ahead", False),
        ("**.head", "model.ahead", False),
        ("**.head.*", "head.proj", True),
        ("model.**.mlp", "model.mlp", True),
        ("model.**.mlp", "model.layers.1.mlp", True),
        ("model.**.mlp", "modelx.mlp", False),
        ("a**.b", "a.b", True),
        ("a**.b", "ax.y.b", True),
        ("model.**", "model", False),
        ("*", "model.norm", False),
        ("*", "lm_head", True),
        ("model.layers.{0,31}.**", "model.layers.31.mlp.up_proj", True),
        ("model.layers.{0,31}.**", "model.layers.3.mlp.up_proj", False),
        ("model.layers.?.mlp.up_proj", "model.layers.3.mlp.up_proj", True),
        ("model.layers.?.mlp.up_proj", "model.layers.13.mlp.up_proj", False),
        ("model.norm", "modelXnorm", False),
        ("lm_head", "lm_head.extra", False),
    ],
)
def test_globs(pattern: str, name: str, matches: bool) -> None:
    assert rule(f"{pattern}=w8").matches(name) is matches


@given(st.lists(st.text("abc019_", min_size=1, max_size=4), min_size=1, max_size=5), st.integers(0, 4))
def test_a_star_replaces_exactly_one_component(parts: list[str], position: int) -> None:
    position %= len(parts)
    pattern = ".".join("*" if i == position else part for i, part in enumerate(parts))
    assert skip(pattern).matches(".".join(parts))
    assert not skip(pattern).matches(".".join([*parts[:position], "x", "y", *parts[position + 1 :]]))
    assert skip(pattern.replace("*", "**")).matches(".".join([*parts[:position], "x", "y", *parts[position + 1 :]]))


def test_later_rules_win() -> None:
    recipe = W4.then([rule("**.down_proj=w8"), skip("model.layers.0.**"), rule("model.layers.0.mlp.down_proj=w6")])
    decided = schemes(recipe)
    assert decided["model.layers.1.mlp.down_proj"] == "w8"
    assert decided["model.layers.0.self_attn.q_proj"] is None
    assert decided["model.layers.0.mlp.down_proj"] == "w6"


@pytest.mark.parametrize("name", ["lm_head", "model.embed_tokens", "model.embed*"])
def test_a_rule_on_either_of_a_tied_pair_applies_to_both(name: str) -> None:
    decided = schemes(W4.then([rule(f"{name}=w8")]))
    assert decided["lm_head"] == decided["model.embed_tokens"] == "w8"


def test_bare_wildcards_do_not_reach_embeddings_and_routers() -> None:
    decided = schemes(W4.then([rule("model.**=w8")]))
    assert decided["model.layers.0.mlp.down_proj"] == "w8"
    assert decided["model.embed_tokens"] is None and decided["model.layers.0.mlp.gate"] is None


@pytest.mark.parametrize("text", ["model.layers.*.mlp.up_proj=w8", "model.norm=w8", "model.embed_tokenz=w8"])
def test_a_rule_that_matches_nothing_is_an_error(text: str) -> None:
    with pytest.raises(RecipeError, match="matches nothing"):
        schemes(W4.then([rule(text)]))


def test_skip_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(RecipeError, match="matches nothing"):
        schemes(W4.then([skip("lm_head")]), tied={})


@pytest.mark.parametrize("text", ["w8", "=w8", "a=", "a.weight=w8", "**." * 5 + "x=w8", "x" * 501 + "=w8"])
def test_bad_rules_are_refused(text: str) -> None:
    with pytest.raises(RecipeError):
        rule(text)


def test_unknown_scheme_offers_the_nearest() -> None:
    with pytest.raises(SchemeError, match="w4g128"):
        rule("**=w4g128q")


def test_yaml_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("scheme: w4g128\nrange: absmax\nrules:\n  - '**.down_proj': w8\n  - lm_head: skip\n")
    recipe = read(path)
    assert recipe == Recipe(parse("w4g128"), "absmax", (rule("**.down_proj=w8"), skip("lm_head")))
    for one in (recipe, dataclasses.replace(recipe, method=method.parse("awq+gptq"))):
        path.write_text(yaml.safe_dump(one.as_dict()))
        assert read(path) == one


@pytest.mark.parametrize(
    "text",
    ["", "- a", "scheme: 4", "range: opt", "scheme: w8\nrules: {a: b}", "scheme: w8\nrules: [{a: w8, b: w8}]",
     "scheme: w8\nmethod: best",
     "scheme: w8\nrange: best", "scheme: w8\nrulez: []", "scheme: [", "scheme: !!python/object/apply:os.system [ls]"],
)  # fmt: skip
def test_bad_yaml_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError):
        read(path)


@pytest.mark.parametrize(
    ("scheme", "chosen"),
    [
        ("w4g64", "gptq"),
        ("w2g32", "blockap"),
        ("w2g32h", "blockap"),
        ("w2t", "signround"),
        ("ternary", "signround"),
        ("w3g64", "signround"),
        ("w8", "gptq"),
        ("w8a8", "smoothquant+gptq"),
    ],
)
def test_auto_is_what_was_measured_best(scheme: str, chosen: str) -> None:
    """Learners take ten times as long as gptq and more: they are asked for."""
    assert str(method.auto(parse(scheme), with_text=True, effort="high")) == chosen
    usual = "smoothquant+gptq" if "a8" in scheme else "gptq"
    assert str(method.auto(parse(scheme), with_text=True)) == usual
    assert str(method.auto(parse(scheme), with_text=False)) == "rtn"
    assert (method.gain_of_effort(parse(scheme)) is None) == (chosen == usual)


@pytest.mark.parametrize(
    ("named", "with_text", "effort"), [("gptq", True, "high"), (None, False, "high"), (None, True, "most")]
)
def test_effort_is_about_a_choice_that_is_left(named: str | None, with_text: bool, effort: str) -> None:
    chosen = Recipe(parse("w2g32"), method=None if named is None else method.parse(named))
    with pytest.raises(RecipeError, match="effort"):
        run.decided(chosen, with_text, effort)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("gptq+awq", "gptq comes last"),
        ("awq+awq+gptq", "twice"),
        ("best", "unknown method 'best'"),
        ("awq+best", "unknown method 'best'"),
        ("awq+", "unknown method ''"),
        ("rtn+gptq", "rtn comes last"),
    ],
)
def test_chains_that_are_none_are_refused(text: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        method.parse(text)


def test_chains_without_a_solver_end_in_rtn() -> None:
    assert str(method.parse("smoothquant+awq")) == "smoothquant+awq+rtn"
    assert method.parse("awq").needs_text and method.parse("gptq").needs_text
    assert not method.parse("hqq").needs_text and not method.parse("hadamard").needs_text
