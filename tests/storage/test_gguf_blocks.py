"""Blocks of ggml's types: their numbers are llama.cpp's to the bit, their bytes come back, nothing is approximated."""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.util
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from spicerack.errors import CheckpointError, SchemeError, ShapeError, WeightError
from spicerack.numerics import codec
from spicerack.numerics.levels import IntLevels
from spicerack.numerics.qtensor import QTensor
from spicerack.numerics.scheme import Scheme, parse
from spicerack.storage import format as formats
from spicerack.storage.format import Host, StoredTensor
from spicerack.storage.gguf import blocks, layouts
from spicerack.storage.gguf.ggml import BY_ID, TYPES, GgmlType
from spicerack.storage.reader import Checkpoint, TensorInfo

DECODED = [type_ for type_ in TYPES.values() if type_.scheme is not None]
NOT_IN_GGUF_PY = {"Q1_0", "Q2_0"}


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def places(type_: GgmlType) -> list[int]:
    """Where the float16 of a block begin."""
    ends = np.cumsum([field.nbytes for field in layouts.LAYOUTS[type_.name]])
    fields = zip(layouts.LAYOUTS[type_.name], ends, strict=True)
    return [int(end) - 2 for field, end in fields if isinstance(field, layouts.Half)]


def random_rows(type_: GgmlType, *leading: int) -> torch.Tensor:
    """uint8 [.., 3 blocks]: any bytes but those that mean nothing."""
    raw = torch.randint(
        256, (*leading, 3, type_.nbytes), dtype=torch.uint8, generator=torch.Generator().manual_seed(type_.id)
    )
    for place in places(type_):
        raw[..., place + 1] &= 0xBF  # finite: the topmost bit of the exponent is 0
    if type_.name == "MXFP4":
        raw[..., 0].clamp_(max=250)  # numbers that float32 has
    if type_.name == "NVFP4":
        raw[..., :4] %= 0x7F
    if type_.name == "TQ2_0":
        raw[..., :64] &= ~((raw[..., :64] & 0x55) << 1)  # no 3
    return raw.flatten(-2)


def test_the_table_is_ggmls() -> None:
    for number, (block, nbytes) in gguf.GGML_QUANT_SIZES.items():
        if number.name not in ("Q8_1", "Q8_K"):
            assert (BY_ID[number.value].name, BY_ID[number.value].block, BY_ID[number.value].nbytes) == (
                number.name, block, nbytes
            )  # fmt: skip
    for type_ in DECODED:
        fields = layouts.LAYOUTS[type_.name]
        assert sum(field.nbytes for field in fields) == type_.nbytes
        assert parse(str(type_.scheme)).stored_bits((1, type_.block)) - (32 if type_.name == "NVFP4" else 0) == (
            8 * type_.nbytes if type_.name not in ("TQ1_0",) else 528  # 1.6 bits a code of what counts as two
        )
    with pytest.raises(ShapeError, match="no whole blocks of 256"):
        TYPES["Q4_K"].row_bytes(300)


@pytest.mark.parametrize("type_", DECODED, ids=str)
def test_codes_are_drawn_into_a_stream_and_back(type_: GgmlType) -> None:
    raw = random_rows(type_, 7)
    q, u = blocks.decode(type_, raw), blocks.undecoded(type_, raw)
    assert u.order == "stream" and torch.equal(u.qtensor().codes, q.codes)
    assert torch.equal(codec.decode(u.qtensor()), codec.decode(q))
    assert torch.equal(blocks.encode(type_, u), blocks.encode(type_, q))


@pytest.mark.parametrize("type_", DECODED, ids=str)
def test_compiled_planes_are_those_of_the_table(type_: GgmlType) -> None:
    if (planes := layouts.planes_of(type_.name)) is None:
        pytest.skip("its codes are no planes")
    raw = random_rows(type_, 5).reshape(-1, type_.nbytes)
    wanted = layouts.Parts()
    for (_, _, _, at), field in zip(
        planes.planes, [f for f in layouts.LAYOUTS[type_.name] if isinstance(f, layouts.Planes) and f.part == "u"],
        strict=True,
    ):  # fmt: skip
        field.unpack(raw[:, at : at + field.nbytes], wanted)
        assert torch.equal(field.pack({"u": layouts.unpack(type_.name, raw)["u"]}), raw[:, at : at + field.nbytes])
    assert torch.equal(layouts.unpack(type_.name, raw)["u"], wanted["u"])


@pytest.mark.parametrize("type_", DECODED, ids=str)
def test_any_bytes_are_llama_cpps_numbers_and_come_back(type_: GgmlType) -> None:
    raw = random_rows(type_, 40)
    q = blocks.decode(type_, raw)
    assert q.scheme.name == type_.scheme
    if type_.name not in NOT_IN_GGUF_PY:
        theirs = gguf.dequantize(raw.numpy(), gguf.GGMLQuantizationType(type_.id))
        assert np.array_equal(codec.decode(q).numpy(), theirs)
    again = blocks.encode(type_, q)
    if type_.name == "TQ1_0":  # 13 bytes stand for what another stands for: the first of them is written
        assert torch.equal(blocks.encode(type_, blocks.decode(type_, again)), again)
        assert torch.equal(blocks.decode(type_, again).codes, q.codes)
    else:
        assert torch.equal(again, raw)


def test_bits_and_pairs_are_read_as_ggml_has_them() -> None:
    """gguf-py has neither type: bit i is 1 for d and 0 for -d, and codes 0..3 stand for -1, 0, 1, 2."""
    raw = random_rows(TYPES["Q1_0"], 2).reshape(2, 3, 18)
    d = raw[..., :2].contiguous().view(torch.float16).float()
    bits = torch.from_numpy(np.unpackbits(raw[..., 2:].numpy(), axis=-1, bitorder="little"))
    decoded = codec.decode(blocks.decode(TYPES["Q1_0"], raw.flatten(1))).reshape(2, 3, 128)
    assert torch.equal(decoded, torch.where(bits.bool(), d, -d))
    raw = random_rows(TYPES["Q2_0"], 2).reshape(2, 3, 18)
    d = raw[..., :2].contiguous().view(torch.float16).float()
    codes = torch.stack([raw[..., 2:] >> shift & 3 for shift in (0, 2, 4, 6)], -1).flatten(-2)
    decoded = codec.decode(blocks.decode(TYPES["Q2_0"], raw.flatten(1))).reshape(2, 3, 64)
    assert torch.equal(decoded, (codes.float() - 1) * d)


@pytest.mark.interop
@pytest.mark.parametrize("type_", DECODED, ids=str)
def test_numbers_are_those_of_ggmls_own_code(type_: GgmlType) -> None:
    found = importlib.util.find_spec("xllamacpp")
    if found is None or found.origin is None:
        pytest.skip("xllamacpp is not installed")
    library = ctypes.CDLL(str(next(Path(found.origin).parent.glob("*.so"))))
    name = type_.name.replace("Q", "q") if type_.name.endswith("_K") else type_.name.lower()
    function = library[f"dequantize_row_{name}"]
    raw = random_rows(type_, 40)
    theirs = np.empty(raw.numel() // type_.nbytes * type_.block, dtype=np.float32)
    function(
        ctypes.c_void_p(raw.data_ptr()), theirs.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(theirs.size)
    )  # fmt: skip
    assert np.array_equal(codec.decode(blocks.decode(type_, raw)).numpy().reshape(-1), theirs)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4"])
def test_what_gguf_py_quantizes_is_written_again_to_the_byte(name: str) -> None:
    type_, w = TYPES[name], gaussian(6, 512).numpy()
    theirs = torch.from_numpy(gguf.quantize(w, gguf.GGMLQuantizationType(type_.id)))
    q = blocks.decode(type_, theirs)
    assert torch.equal(blocks.encode(type_, q), theirs)
    assert np.array_equal(codec.decode(q).numpy(), gguf.dequantize(theirs.numpy(), gguf.GGMLQuantizationType(type_.id)))


@pytest.mark.parametrize("type_", DECODED, ids=str)
@pytest.mark.parametrize("shape", [(4, 512), (2, 3, 256)], ids=["matrix", "stack"])
def test_what_the_codec_encodes_is_what_llama_cpp_reads(type_: GgmlType, shape: tuple[int, ...]) -> None:
    q, scale = blocks.without_tensor_scale(codec.encode(gaussian(*shape), parse(str(type_.scheme))))
    raw = blocks.encode(type_, q)
    assert raw.shape == (*shape[:-1], type_.row_bytes(shape[-1])) and raw.dtype == torch.uint8
    if type_.name not in NOT_IN_GGUF_PY:
        theirs = gguf.dequantize(raw.numpy(), gguf.GGMLQuantizationType(type_.id))
        assert np.array_equal(theirs, codec.decode(q).numpy())
    back = blocks.decode(type_, raw, transposed=True)
    assert back.transposed and torch.equal(back.codes, q.codes)
    assert torch.equal(codec.decode(dataclasses.replace(back, transposed=False)), codec.decode(q))
    assert (scale is not None) == (type_.name == "NVFP4")


# ---- schemes that are no type's own ----------------------------------------------------------------------------------

# Types with a minimum hold zero points where float16 holds zero * scale: of 2 bits these numbers' happen to be so.
EXACT = {
    "w4g32": "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0",
    "w4g128": "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0",
    "w4g256": "Q4_0 Q4_K Q4_1 Q5_0 Q5_K Q5_1 Q6_K Q8_0",
    "w4t": "Q4_0 Q4_K Q4_1 Q5_0 Q5_K Q5_1 Q6_K Q8_0",
    "w5g64": "Q5_0 Q5_1 Q8_0",
    "w6g32": "Q8_0",
    "w6": "Q6_K Q8_0",
    "w7g32": "Q8_0",
    "w8": "Q8_0",
    "w8a8": "Q8_0",
    "w3g32": "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0",
    "w3": "Q3_K Q4_0 Q4_K Q4_1 Q5_0 Q5_K Q5_1 Q6_K Q8_0",
    "w2g64": "Q2_0 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0",
    "w2g32h": "Q4_0 Q5_0 Q8_0",
    "w2h": "Q2_K Q3_K Q4_0 Q4_K Q5_0 Q5_K Q6_K Q8_0",
    "w3g32h": "Q4_0 Q5_0 Q8_0",
    "w4g32h": "Q5_0 Q8_0",
    "w2g32z": "Q4_0 Q5_0 Q8_0 Q4_1 Q5_1",
    "w3g32z": "Q4_0 Q5_0 Q8_0",
    "w4g32z": "Q5_0 Q8_0",
    "w4z": "Q4_K Q5_0 Q5_K Q6_K Q8_0",
    "w5z": "Q5_K Q6_K Q8_0",
    "w7g32z": "Q8_0",
    "w4g32m": "Q4_1 Q5_1",
    "w4g64m": "Q4_1 Q5_1",
    "w5m": "Q5_1",
    "w4g128f": "",
    "ternary": "TQ1_0 TQ2_0 Q2_0 Q2_K Q3_K Q4_0 Q4_K Q4_1 Q5_0 Q5_K Q5_1 Q6_K Q8_0",
    "ternarya8": "TQ1_0 TQ2_0 Q2_0 Q2_K Q3_K Q4_0 Q4_K Q4_1 Q5_0 Q5_K Q5_1 Q6_K Q8_0",
    "w8z": "",
    "w4g16": "",
    "w6m": "",
    "nf4": "",
    "fp8": "",
    "q4_k": "Q4_K",
}


@pytest.mark.parametrize("name", EXACT)
def test_a_type_holds_a_scheme_to_the_bit_or_says_why_not(name: str) -> None:
    """Of all types: those that are listed hold it, every other one has an obstacle; what holds it is equal."""
    q = codec.encode(gaussian(8, 768), parse(name))
    exact = [type_.name for type_ in blocks.types_for(q.scheme, q.shape) if blocks.obstacle(type_, q) is None]
    assert " ".join(exact) == EXACT[name]
    for type_ in DECODED:
        reason = blocks.obstacle(type_, q)
        assert (reason is None) == (type_.name in exact), (type_.name, reason)
        if reason is not None:
            with pytest.raises(SchemeError, match=f"layer: {name} cannot be {type_.name}: "):
                blocks.encode(type_, q, "layer")
            continue
        raw = blocks.encode(type_, q)
        assert torch.equal(codec.decode(blocks.decode(type_, raw)), codec.decode(q)), type_
        if type_.name not in NOT_IN_GGUF_PY:
            theirs = gguf.dequantize(raw.numpy(), gguf.GGMLQuantizationType(type_.id))
            assert np.array_equal(theirs, codec.decode(q).numpy()), type_
    fitting = blocks.fitting(q)
    assert (fitting.name if fitting else "") == EXACT[name].partition(" ")[0]


def test_zero_points_lie_in_q4_1_where_float16_holds_the_minimum() -> None:
    q = codec.encode(gaussian(4, 64), parse("w4g32z"))
    q = dataclasses.replace(q, scale=torch.full_like(q.plain_scale, 0.25))
    assert blocks.fitting(q) == TYPES["Q4_1"]
    assert torch.equal(codec.decode(blocks.decode(TYPES["Q4_1"], blocks.encode(TYPES["Q4_1"], q))), codec.decode(q))
    scale = q.plain_scale.clone()
    scale[2, 1] = 0.1
    q = dataclasses.replace(q, scale=scale, zero=torch.full_like(q.zero, 3) if q.zero is not None else None)
    value = f"{-float(scale[2, 1]) * 11:.6g}"[:5]
    assert str(blocks.obstacle(TYPES["Q4_1"], q)).startswith(
        f"float16 does not hold the minimum, -zero * scale, {value}"
    )
    assert "row 2, block 1" in str(blocks.obstacle(TYPES["Q4_1"], q)) and blocks.fitting(q) == TYPES["Q5_0"]


def test_blocks_of_rows_and_stacks_are_spread() -> None:
    scheme = Scheme("tiles", IntLevels(-8, 7), group=(2, 64), scale="float16")
    q = codec.encode(gaussian(3, 4, 128), scheme)
    assert torch.equal(codec.decode(blocks.decode(TYPES["Q4_0"], blocks.encode(TYPES["Q4_0"], q))), codec.decode(q))


def test_transposed_tensors_are_written_as_rows() -> None:
    q = dataclasses.replace(codec.encode(gaussian(4, 64), parse("w4g32")), transposed=True)
    straight = dataclasses.replace(q, transposed=False)
    for name in ("Q4_0", "F32"):
        assert torch.equal(blocks.encode(TYPES[name], q), blocks.encode(TYPES[name], straight))


@pytest.mark.parametrize(
    ("value", "name", "message"),
    [
        (1e-9, "Q4_0", r"float16 does not hold the scale 9\.968\d*e-10 of row 2, block 1"),
        (1e6, "Q4_0", r"the scale \d+ of row 2, block 1"),
        (2.0**-24, "Q4_0", None),
        (0.1, "Q4_0", None),
        (1e-9, "Q8_0", r"the scale 9\.968\d*e-10 of row 2, block 1"),
        (1e-9, "TQ2_0", r"its groups of 32 are no whole blocks|rows of 64 are no whole blocks of 256"),
        (1e-9, "F16", r"it does not hold \d+ of its numbers"),
        (0.1, "BF16", r"it does not hold \d+ of its numbers"),
        (1e-9, "F32", None),
        (1.0, "IQ4_NL", "IQ4_NL has no integers"),
        (1.0, "IQ2_XS", "it has no scheme of ours"),
    ],
)
def test_scales_of_bfloat16_that_float16_lacks_are_named(value: float, name: str, message: str | None) -> None:
    q = codec.encode(gaussian(4, 64), parse("w4g32"), source=torch.bfloat16)
    scale = torch.full_like(q.plain_scale, 0.25)
    scale[2, 1] = value
    q = dataclasses.replace(q, scale=scale)
    assert scale.dtype == torch.bfloat16
    reason = blocks.obstacle(TYPES[name], q)
    if message is None:
        assert reason is None
    else:
        with pytest.raises(SchemeError, match=message):
            blocks.encode(TYPES[name], q)


# ---- bytes that mean nothing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [0x7C00, 0xFC00, 0x7E01, 0xFFFF], ids=hex)
@pytest.mark.parametrize("type_", [type_ for type_ in DECODED if places(type_)], ids=str)
def test_scales_that_are_not_finite_are_refused(type_: GgmlType, bits: int) -> None:
    for place in places(type_):
        raw = random_rows(type_, 2, 4)
        raw.reshape(2, 4, 3, -1)[1, 2, 1, place : place + 2] = torch.tensor([bits & 255, bits >> 8], dtype=torch.uint8)
        with pytest.raises(
            CheckpointError, match=r"blk: matrix 1, row 2, block 1 has a (scale|minimum) of -?(inf|nan)"
        ):
            blocks.decode(type_, raw, "blk")


@pytest.mark.parametrize(
    ("name", "place", "byte", "message"),
    [
        ("MXFP4", 0, 255, "row 1, block 2 has a scale that is no number"),
        ("NVFP4", 3, 0x7F, "row 1, block 11 has a scale that is no number"),
        ("NVFP4", 3, 0x80, "row 1, block 11 has a scale that is no number"),
        ("TQ2_0", 5, 0b00110000, "row 1 has a code that is none of -1, 0 and 1"),
    ],
)
def test_codes_that_are_no_level_are_refused(name: str, place: int, byte: int, message: str) -> None:
    raw = random_rows(TYPES[name], 2)
    raw.reshape(2, 3, -1)[1, 2, place] = byte
    with pytest.raises(CheckpointError, match=message):
        blocks.decode(TYPES[name], raw, "blk")


def test_what_is_no_rows_is_refused() -> None:
    for raw in (torch.zeros(2, 19), torch.zeros(2, 19, dtype=torch.uint8), torch.zeros(18, dtype=torch.uint8)):
        with pytest.raises(CheckpointError, match="are no rows of Q4_0"):
            blocks.decode(TYPES["Q4_0"], raw, "blk")
    with pytest.raises(CheckpointError, match="blk: IQ2_XS is not decoded"):
        blocks.decode(TYPES["IQ2_XS"], torch.zeros(2, 74, dtype=torch.uint8), "blk")


# ---- floats, and NVFP4's scale ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "dtype"), [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_floats(name: str, dtype: torch.dtype) -> None:
    w = gaussian(3, 5).to(dtype)
    raw = blocks.encode_floats(TYPES[name], w)
    assert torch.equal(blocks.decode_floats(TYPES[name], raw), w)
    shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), raw.reshape(-1)])[1:].reshape(raw.shape)
    assert torch.equal(blocks.decode_floats(TYPES[name], shifted), w)
    theirs = gguf.dequantize(raw.numpy() if name == "BF16" else raw.numpy().view(f"<f{dtype.itemsize}"),
                             gguf.GGMLQuantizationType(TYPES[name].id))  # fmt: skip
    assert np.array_equal(theirs, w.float().numpy())
    assert torch.equal(blocks.encode_floats(TYPES["F32"], w), w.float().view(torch.uint8))
    if name == "F32":
        with pytest.raises(WeightError, match=r"norm: F16 does not hold .* at \[0, 0\]"):
            blocks.encode_floats(TYPES["F16"], w, "norm")


@pytest.mark.parametrize("shape", [(4, 64), (3, 4, 64)], ids=["matrix", "stack"])
def test_the_scale_of_an_nvfp4_tensor_lies_beside_it(shape: tuple[int, ...]) -> None:
    q = codec.encode(gaussian(*shape), parse("nvfp4"))
    assert "no scale of the tensor" in str(blocks.obstacle(TYPES["NVFP4"], q))
    inner, scale = blocks.without_tensor_scale(q)
    assert scale is not None and scale.shape == ((1,) if len(shape) == 2 else (3,))
    again = blocks.with_tensor_scale(blocks.decode(TYPES["NVFP4"], blocks.encode(TYPES["NVFP4"], inner)), scale)
    assert torch.equal(codec.decode(again), codec.decode(q))
    same, none = blocks.without_tensor_scale(inner)
    assert same is inner and none is None
    assert isinstance(inner.scale, QTensor)
    negative = dataclasses.replace(inner.scale, codes=inner.scale.codes | 128)
    assert "has a negative scale" in str(blocks.obstacle(TYPES["NVFP4"], dataclasses.replace(inner, scale=negative)))


# ---- the format ------------------------------------------------------------------------------------------------------


def checkpoint_of(config: dict[str, object], tensors: dict[str, tuple[str, tuple[int, ...]]]) -> Checkpoint:
    infos = {name: TensorInfo(name, dtype, shape, 0, "m.gguf") for name, (dtype, shape) in tensors.items()}
    return Checkpoint(Path("m.gguf"), config, infos, ("m.gguf",), ())


@pytest.mark.parametrize("type_", DECODED, ids=str)
def test_the_format_is_the_rows_under_a_checkpoints_names(type_: GgmlType) -> None:
    fmt = formats.get("gguf")
    q = codec.encode(gaussian(2, 4, 256), parse(str(type_.scheme)))
    stored = StoredTensor("experts", q.scheme, q.shape, transposed=True)
    assert fmt.obstacles({"experts": stored}) == []
    tensors = fmt.encode(stored, q)
    layout = fmt.layout(stored)
    assert {name: ({torch.uint8: "U8"}.get(t.dtype, "F32"), tuple(t.shape)) for name, t in tensors.items()} == layout
    config = fmt.config({"model_type": "llama"}, {"experts": stored}, fmt.reading({}, {}, Host()))
    assert fmt.recognizes(config) and fmt.float_config(config) == {"model_type": "llama"}
    read = fmt.contents(checkpoint_of(config, layout))["experts"]
    assert read.variant == (
        "TQ2_0" if type_.name == "TQ1_0" else "NVFP4+scale" if "experts.scale" in layout else type_.name
    )
    assert (read.shape, read.scheme, read.transposed) == (q.shape, q.scheme, True)
    back = fmt.decode(read, tensors)
    assert torch.equal(codec.decode(dataclasses.replace(back, transposed=False)), codec.decode(q)) and back.transposed
    assert fmt.undecoded(read, tensors) is None


def test_the_format_is_taken_only_on_request() -> None:
    contents = {"a": StoredTensor("a", parse("q4_k"), (4, 256))}
    assert formats.get("gguf").obstacles(contents) == [] and formats.get("gguf").on_request
    assert formats.choose(contents).name == "spicerack"
    wrong = {
        "a": StoredTensor("a", parse("w4g128"), (4, 256)),
        "b": StoredTensor("b", parse("w4g32"), (4, 256), source_dtype=torch.bfloat16),
        "c": StoredTensor("c", parse("q4_k"), (4, 128)),
    }
    assert formats.get("gguf").obstacles(wrong) == [
        "a: gguf has no w4g128", "b: gguf has no scales in bfloat16",
        "c: gguf has no rows of 128 in Q4_K, only multiples of 256",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("section", "tensors", "message"),
    [
        ({}, {}, "has no table of types"),
        ({"types": {"a": "Q4_K"}, "transposed": 3}, {}, "has no table of types"),
        ({"types": {"a": 3}}, {}, "a is in the type 3, which is not read"),
        ({"types": {"a": "IQ1_S"}}, {}, "a is in the type 'IQ1_S'"),
        ({"types": {"a": "F32"}}, {}, "a is in the type 'F32'"),
        ({"types": {"a": "Q4_K"}}, {}, r"a\.weight is missing, not rows of Q4_K"),
        ({"types": {"a": "Q4_K"}}, {"a.weight": ("U8", (4, 145))}, r"a\.weight is U8 \[4, 145\], not rows of Q4_K"),
        ({"types": {"a": "Q4_K"}}, {"a.weight": ("F16", (4, 144))}, r"a\.weight is F16"),
        ({"types": {"a": "Q4_K"}}, {"a.weight": ("U8", (144,))}, r"not rows of Q4_K"),
        (
            {"types": {"a": "Q4_K"}},
            {"a.weight": ("U8", (4, 144)), "a.scale": ("F32", (1,))},
            r"a\.scale is F32 \[1\], which Q4_K has not",
        ),
        (
            {"types": {"a": "NVFP4"}},
            {"a.weight": ("U8", (4, 36)), "a.scale": ("F32", (2,))},
            r"a\.scale is F32 \[2\], which NVFP4 has not",
        ),
    ],
)
def test_what_is_not_as_its_config_says(
    section: dict[str, object], tensors: dict[str, tuple[str, tuple[int, ...]]], message: str
) -> None:
    config = {"quantization_config": {"quant_method": "gguf", **section}}
    with pytest.raises(CheckpointError, match=message):
        formats.get("gguf").contents(checkpoint_of(config, tensors))


def test_a_scale_of_the_tensor_must_be_finite() -> None:
    fmt, q = formats.get("gguf"), codec.encode(gaussian(4, 64), parse("nvfp4"))
    stored = StoredTensor("a", q.scheme, q.shape)
    tensors = fmt.encode(stored, q)
    tensors["a.scale"] = torch.tensor([float("inf")])
    with pytest.raises(CheckpointError, match="a scale of the tensor that is not finite"):
        fmt.decode(stored, tensors)
