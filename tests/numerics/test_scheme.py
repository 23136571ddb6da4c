"""Names of schemes: parsed, printed, refused; and what they weigh."""

from __future__ import annotations

import pytest

from spicerack.errors import SchemeError, ShapeError
from spicerack.numerics.levels import FloatLevels, IntLevels, TableLevels
from spicerack.numerics.scheme import Scheme, parse


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group", ["", "g64", "t"])
@pytest.mark.parametrize("kind", ["", "z", "h"])
@pytest.mark.parametrize("activations", ["", "a8", "a8s"])
def test_the_whole_grammar(bits: int, group: str, kind: str, activations: str) -> None:
    name = f"w{bits}{group}{kind}{activations}"
    scheme = parse(name)
    half = 2 ** (bits - 1)
    assert str(scheme) == name
    assert scheme.levels == IntLevels(-half, half - 1, half=kind == "h")
    assert scheme.bits == bits
    assert scheme.group == {"": (1, None), "g64": (1, 64), "t": (None, None)}[group]
    assert scheme.zero == (kind == "z")
    assert scheme.activations == {"": None, "a8": "token", "a8s": "static"}[activations]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("kind", ["", "z", "h", "m"])
def test_the_grammar_of_minima_and_of_scales_in_float32(bits: int, kind: str) -> None:
    narrow, wide = parse(f"w{bits}g64{kind}"), parse(f"w{bits}g64{kind}f")
    assert (wide.name, wide.scale, wide.levels, wide.zero) == (
        f"w{bits}g64{kind}f",
        "float32",
        narrow.levels,
        kind == "z",
    )
    assert (narrow.scale, narrow.min) == ("source", "source" if kind == "m" else None)
    assert wide.min == ("float32" if kind == "m" else None)
    assert kind != "m" or narrow.levels == IntLevels(0, 2**bits - 1)
    assert (wide.plain_obstacle is None) == (kind != "m")


@pytest.mark.parametrize("name", ["w4g64ma8", "w8fa8", "w8mfa8s"])
def test_no_minima_and_no_wide_scales_where_activations_are_integers(name: str) -> None:
    with pytest.raises(SchemeError, match="unknown scheme"):
        parse(name)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("w4g128s", "w4g128"),
        ("W4G12S", "w4g128"),
        ("nf5", "nf4"),
        ("q4k", "q4_k"),
        ("terner", "ternary"),
        ("w4-g32z", "w4g32z"),
    ],
)
def test_unknown_names_get_the_nearest(name: str, near: str) -> None:
    with pytest.raises(SchemeError, match=rf"unknown scheme '{name}' \(did you mean .*\b{near}\b"):
        parse(name)


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("INT8", "w8"), ("int4", "w4g128"), ("8-bit", "w8"), ("W4A16", "w4g128"), ("W8A8", "w8a8"),
        ("w8a16", "w8"), ("Q8_0", "w8g32"), ("Q4_0", "w4g32"), ("Q4_1", "q4_1"),
        ("Q5_1", "q5_1"), ("Q6_K", "q6_k"), ("IQ4_NL", "iq4_nl"), ("Q4_K", "q4_k"), ("NF4", "nf4"),
        ("W4G32Z", "w4g32z"), ("FP8", "fp8"), ("MXFP4", "mxfp4"), ("BitNet", "ternary"), ("1.58-bit", "ternary"),
    ],
)  # fmt: skip
def test_names_that_people_type(typed: str, name: str) -> None:
    assert parse(typed) == parse(name) and parse(typed).name == name


@pytest.mark.parametrize(
    "name", ["", "w", "w9", "w1", "w4g0", "w4g", "w4g1000000", "w4zh", "w4a4", "../w4", "w\uff14", "__init__", "w4\n"]
)
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(SchemeError):
        parse(name)


def test_levels() -> None:
    assert IntLevels(-2, 1, half=True).values == (-1.5, -0.5, 0.5, 1.5)
    assert [IntLevels(-1, 1).bits, IntLevels(0, 63).bits, IntLevels(0, 0).bits] == [2, 6, 1]
    e2m1 = FloatLevels(2, 1)
    assert e2m1.values[:8] == (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    assert e2m1.values[8:] == tuple(-v for v in e2m1.values[:8])
    assert max(FloatLevels(4, 3, max_value=448).values) == 448
    assert max(FloatLevels(5, 2, ieee_specials=True).values) == 57344


def test_contradictions_are_refused() -> None:
    with pytest.raises(SchemeError, match="a zero point needs integer levels"):
        Scheme("x", TableLevels((0.0, 1.0)), zero=True)
    with pytest.raises(SchemeError, match="9 bits a code"):
        Scheme("x", IntLevels(0, 256))


@pytest.mark.parametrize(
    ("name", "bits_per_weight"),
    [
        ("w8", 8 + 16 / 1024),
        ("w4g128", 4 + 16 / 128),
        ("w4g32z", 4 + (16 + 4) / 32),
        ("w3g64", 3 + 16 / 64),
        ("w2g32h", 2.5),
        ("w4t", 4 + 16 / (64 * 1024)),
        ("ternary", 2 + 16 / (64 * 1024)),
        ("mxfp4", 4.25),
        ("nvfp4", 4.5 + 32 / (64 * 1024)),
        *zip(("q2_k", "q3_k", "q4_k", "q5_k", "q6_k"), (2.625, 3.4375, 4.5, 5.5, 6.5625), strict=True),
        *zip(("q4_1", "q5_1", "iq4_nl", "ternaryg256", "q1_0", "q2_0"), (5, 6, 4.5, 2.0625, 1.125, 2.25), strict=True),
        ("fp8", 8 + 16 / 1024),
        ("nf4", 4.25),
    ],
)
def test_stored_bits(name: str, bits_per_weight: float) -> None:
    assert parse(name).stored_bits((64, 1024)) / (64 * 1024) == bits_per_weight


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("w4g128", (8, 172), r"K=172 is not divisible by w4g128's block of 128 \(use group 4 or skip it\)"),
        ("w4g128", (8, 192), r"use group 64 or skip it"),
        ("w4g32", (8, 33), r"use one scale per row, or skip it"),
        ("w8", (8,), r"shape \[8\] is not a matrix"),
        ("w8", (0, 8), r"shape \[0, 8\] is not a matrix"),
        ("q4_k", (8, 128), r"layer \(scales\): K=4 is not divisible by q4_k scales's block of 8"),
    ],
)
def test_shapes_that_do_not_fit(name: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        parse(name).check_shape("layer", shape)
