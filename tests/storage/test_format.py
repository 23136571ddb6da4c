"""Bytes of both formats, asserted literally; every scheme there and back; which is chosen; what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import LlamaFolder
from dropped import dropped
from safetensors.torch import save_file

import spicerack
from spicerack.errors import CheckpointError, SchemeError
from spicerack.models.architecture import on_meta
from spicerack.numerics import codec, packed
from spicerack.numerics.dtypes import safetensors_dtype
from spicerack.numerics.levels import FloatLevels, IntLevels, TableLevels
from spicerack.numerics.qtensor import QTensor
from spicerack.numerics.scheme import Scheme, parse
from spicerack.quantization.recipe import Recipe, Rule
from spicerack.storage import format, formats, layouts
from spicerack.storage.format import Host, Reading, StoredTensor
from spicerack.storage.reader import Checkpoint

CT, OWN = format.get("compressed_tensors"), format.get("spicerack")
CT_SCHEMES = [f"w{bits}{g}{z}" for bits in range(2, 9) for g in ("", "g32") for z in ("", "z")]
CT_SCHEMES += ["w8a8", "w8a8s"]
E4M3 = Scheme("e4m3", FloatLevels(4, 3, max_value=448.0), group=(None, None), scale="float32")
NVFP4_LIKE = Scheme("nvfp4_like", FloatLevels(2, 1), group=(1, 16), scale=E4M3)
Q4K_PART = Scheme("q4k_part", IntLevels(0, 63), group=(1, 8), scale="float16")
Q4K_LIKE = Scheme(
    "q4k_like", IntLevels(0, 15), group=(1, 32), scale=Q4K_PART, min=Scheme("m", IntLevels(-63, 0), (1, 8))
)
RECTANGLES = Scheme("rectangles", TableLevels((-1.0, 0.0, 1.0)), group=(8, 16), scale="float32")
EVERY = [
    *map(parse, [*CT_SCHEMES, "w2h", "w2g32h", "w8t", "w4t", "w3g64a8", "w4g32za8s"]),
    NVFP4_LIKE,
    Q4K_LIKE,
    RECTANGLES,
]


def same(a: QTensor, b: QTensor) -> bool:
    parts = [(a.codes, b.codes), (a.zero, b.zero), (a.scale, b.scale), (a.min, b.min), (a.input_scale, b.input_scale)]
    for x, y in parts:
        if isinstance(x, QTensor) and isinstance(y, QTensor):
            if not same(x, y):
                return False
        elif (x is None) != (y is None) or (x is not None and not (x.dtype == y.dtype and torch.equal(x, y))):
            return False
    return a.scheme == b.scheme and a.transposed == b.transposed


def random_weight(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3)).to(dtype)


def encoded(w: torch.Tensor, scheme: Scheme) -> QTensor:
    q = codec.encode(w, scheme, range_="absmax")
    return dataclasses.replace(q, input_scale=torch.tensor([0.02])) if scheme.activations == "static" else q


def matches_layout(layout: format.Layout, tensors: dict[str, torch.Tensor]) -> bool:
    actual = {name: (safetensors_dtype(t.dtype), tuple(t.shape)) for name, t in tensors.items()}
    return list(actual.items()) == list(layout.items())


# ---- there and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CT_SCHEMES)
def test_compressed_tensors_there_and_back(name: str, dtype: torch.dtype) -> None:
    q = encoded(random_weight(5, 96, dtype=dtype), parse(name))
    stored = StoredTensor("a.b", parse(name), (5, 96), source_dtype=dtype)
    tensors = CT.encode(stored, q)
    assert matches_layout(CT.layout(stored), tensors)
    assert same(CT.decode(stored, tensors), q)


@pytest.mark.parametrize("shape", [(8, 256), (3, 8, 256)])
@pytest.mark.parametrize("scheme", EVERY, ids=str)
def test_the_container_holds_every_scheme(scheme: Scheme, shape: tuple[int, ...]) -> None:
    q = encoded(random_weight(*shape), scheme)
    stored = StoredTensor("a.b", scheme, shape, "experts" if len(shape) == 3 else "linear")
    if not scheme.zero and isinstance(scheme.scale, str):  # the others' rows do not fill whole words
        assert scheme.stored_bits(shape) == 8 * sum(t.nbytes for t in packed.pack(q).values())
    tensors = OWN.encode(stored, q)
    assert matches_layout(OWN.layout(stored), tensors)
    assert same(OWN.decode(stored, tensors), q)


@pytest.mark.parametrize("scheme", EVERY, ids=str)
def test_any_rows_decode_to_the_specification(scheme: Scheme) -> None:
    q = codec.encode(random_weight(24, 256), scheme, range_="absmax")
    whole, tensors = codec.decode(q), packed.pack(q)
    assert torch.equal(packed.decode_rows(scheme, (24, 256), tensors, slice(0, 24)), whole)
    assert torch.equal(packed.decode_rows(scheme, (24, 256), tensors, slice(8, 17)), whole[8:17])
    rows = torch.tensor([3, 23, 3, 0])
    assert torch.equal(packed.decode_rows(scheme, (24, 256), tensors, rows), whole[rows])


# ---- golden bytes ----------------------------------------------------------------------------------------------------


def tiny(zero: bool) -> QTensor:
    codes = torch.tensor([[-8, -7, 0, 7, 1, -1, 2, -2], [7, 6, 5, 4, 3, 2, 1, 0]], dtype=torch.int8)
    scale = torch.tensor([[1.0, -0.5], [2.0, 0.25]], dtype=torch.float16)
    z = torch.tensor([[-8, 1], [7, 0]], dtype=torch.int8) if zero else None
    return QTensor(parse("w4g4z" if zero else "w4g4"), codes, scale, z)


@pytest.mark.parametrize("scheme", [parse("ternary"), RECTANGLES], ids=str)
def test_bits_that_are_no_code_are_refused(scheme: Scheme) -> None:
    stored = StoredTensor("a.b", scheme, (16, 32))
    tensors = OWN.encode(stored, codec.encode(random_weight(16, 32), scheme, range_="absmax"))
    OWN.decode(stored, tensors)
    tensors["a.b.codes"][3, 1] |= 3 << 10  # column 16 + 5 in two bits
    with pytest.raises(CheckpointError, match="a code that is none of"):
        OWN.decode(stored, tensors)


def test_golden_bytes_of_compressed_tensors() -> None:
    stored = StoredTensor("p", parse("w4g4z"), (2, 8))
    tensors = CT.encode(stored, tiny(zero=True))
    assert {name: t.view(torch.uint8).reshape(-1).tolist() for name, t in tensors.items()} == {
        "p.weight_packed": [0x10, 0xF8, 0x79, 0x6A, 0xEF, 0xCD, 0xAB, 0x89],
        "p.weight_scale": [0x00, 0x3C, 0x00, 0xB8, 0x00, 0x40, 0x00, 0x34],
        "p.weight_zero_point": [0xF0, 0, 0, 0, 0x89, 0, 0, 0],  # one word per group, down the rows
        "p.weight_shape": [2, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0],
    }
    q = QTensor(parse("w8a8"), torch.tensor([[-128, 127]], dtype=torch.int8), torch.ones(1, 1, dtype=torch.float16))
    tensors = CT.encode(StoredTensor("p", q.scheme, (1, 2)), q)
    assert {n: t.tolist() for n, t in tensors.items()} == {"p.weight": [[-128, 127]], "p.weight_scale": [[1.0]]}
    static = dataclasses.replace(q, scheme=parse("w8a8s"), input_scale=torch.tensor([0.25]))
    tensors = CT.encode(StoredTensor("p", static.scheme, (1, 2)), static)
    assert tensors.pop("p.input_scale").numpy().tobytes() == b"\0\0\x80\x3e"
    assert {n: t.tolist() for n, t in tensors.items()} == {"p.weight": [[-128, 127]], "p.weight_scale": [[1.0]]}


def test_golden_bytes_of_the_container() -> None:
    tensors = OWN.encode(StoredTensor("p", parse("w4g4z"), (2, 8)), tiny(zero=True))
    assert {name: t.view(torch.uint8).reshape(-1).tolist() for name, t in tensors.items()} == {
        "p.codes": [0x10, 0xF8, 0x79, 0x6A, 0xEF, 0xCD, 0xAB, 0x89],
        "p.scale": [0x00, 0x3C, 0x00, 0xB8, 0x00, 0x40, 0x00, 0x34],
        "p.zero": [0x90, 0, 0, 0, 0x8F, 0, 0, 0],  # one word per row
    }


def test_config_of_compressed_tensors() -> None:
    contents = {m: StoredTensor(m, parse("w4g128"), (256, 256)) for m in ("model.layers.0.q", "model.layers.1.q")}
    config = CT.config(
        {"model_type": "llama"}, contents, Reading(["lm_head", "model.layers.0.gate", "model.layers.1.gate"])
    )
    assert config == {
        "model_type": "llama",
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {
                        "num_bits": 4,
                        "type": "int",
                        "symmetric": True,
                        "strategy": "group",
                        "group_size": 128,
                        "dynamic": False,
                        "observer": "minmax",
                    },
                    "input_activations": None,
                    "output_activations": None,
                    "format": "pack-quantized",
                }
            },
            "ignore": ["lm_head", r"re:^model\.layers\.\d+\.gate$"],
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        },
    }
    assert CT.float_config(config) == {"model_type": "llama"}


@pytest.mark.parametrize(
    ("architecture", "schemes", "expected"),
    [
        ("LlamaForCausalLM", ["w4g32"], False),
        ("LlamaForCausalLM", ["w4g32z"], True),
        ("LlamaForCausalLM", ["w4g32z", "w8"], False),
        ("BertModel", ["w8"], True),
        ("BertModel", ["w8", "w4"], False),
        ("GPT2LMHeadModel", ["w8"], False),
    ],
)
def test_transformers_is_told_to_decode_on_loading_where_it_must(
    architecture: str, schemes: list[str], expected
) -> None:
    contents = contents_of(*(StoredTensor(f"l{i}", parse(s), (64, 64)) for i, s in enumerate(schemes)))
    config = {"architectures": [architecture]}
    section = CT.config(config, contents, CT.reading(config, contents, Host()))["quantization_config"]
    assert section.get("dequantize", False) is expected


def test_what_stays_float_is_sorted_under_both_names() -> None:
    """Whatever the seed of hashing, which sets of names are in the order of."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 3, "num_attention_heads": 1}
    llama = on_meta({"model_type": "llama", "architectures": ["LlamaForCausalLM"], **sizes})
    assert llama is not None
    stored = [f"stored.{i}" for i in reversed(range(20))]
    for host, own in ((Host(stored), 0), (Host(stored, model=llama), 22)):
        floats = list(format.names_of(host).floats)
        assert floats == sorted(floats) and set(stored) < {*floats, ""} and len(floats) == 20 + own


def test_targets_of_several_schemes_never_catch_another_layer() -> None:
    contents = {f"l.{i}.{n}": StoredTensor(f"l.{i}.{n}", parse("w8" if (i, n) == (0, "up") else "w4"), (8, 32))
            for i in range(2) for n in ("up", "down")}  # fmt: skip
    groups = CT.config({}, contents, CT.reading({}, contents, Host()))["quantization_config"]["config_groups"]
    assert {g["weights"]["num_bits"]: g["targets"] for g in groups.values()} == {
        8: ["l.0.up"],
        4: [r"re:^l\.\d+\.down$", "l.1.up"],
    }


def test_config_of_the_container() -> None:
    contents = {m: StoredTensor(m, parse("w2h"), (8, 32), "conv1d", torch.bfloat16, True) for m in ("a", "b")}
    config = OWN.config({"model_type": "gpt2"}, contents, Reading())
    assert config == {
        "model_type": "spicerack",
        "quantized": {
            "version": 1,
            "tensors": [
                {
                    "scheme": "w2h",
                    "shape": [8, 32],
                    "role": "conv1d",
                    "dtype": "bfloat16",
                    "transposed": True,
                    "modules": ["a", "b"],
                }
            ],
        },
        "config": {"model_type": "gpt2"},
    }
    assert OWN.float_config(config) == {"model_type": "gpt2"}
    assert "config" not in OWN.config({}, contents, Reading())


# ---- the choice ------------------------------------------------------------------------------------------------------


def contents_of(*stored: StoredTensor) -> dict[str, StoredTensor]:
    return {p.module: p for p in stored}


@pytest.mark.parametrize("name", CT_SCHEMES)
def test_compressed_tensors_is_chosen_where_it_is_exact(name: str) -> None:
    assert format.choose(contents_of(StoredTensor("a", parse(name), (64, 64)))).name == "compressed_tensors"


@pytest.mark.parametrize(
    "stored",
    [
        StoredTensor("a", parse("w2g32h"), (64, 64)),
        StoredTensor("a", parse("w8t"), (64, 64)),
        StoredTensor("a", parse("w4g32a8"), (64, 64)),
        StoredTensor("a", parse("w8"), (64, 64), "embedding"),
        StoredTensor("a", parse("w8"), (64, 64), "conv1d", transposed=True),
        StoredTensor("a", parse("w8"), (4, 64, 64), "experts"),
    ],
    ids=lambda p: f"{p.scheme}-{p.role}",
)
def test_the_container_is_chosen_for_the_rest(stored: StoredTensor) -> None:
    contents = contents_of(stored, StoredTensor("b", parse("w8"), (64, 64)))
    assert format.choose(contents).name == "spicerack"
    notes = format.portability(contents, [], Reading())
    assert "only spicerack reads this folder" in notes[0] and notes[1].startswith("the reason: a: ")


def test_a_scheme_without_a_name_is_refused() -> None:
    with pytest.raises(SchemeError, match="'rectangles' cannot be found"):
        format.choose(contents_of(StoredTensor("a", RECTANGLES, (64, 64))))


@pytest.mark.parametrize(
    ("schemes", "word"),
    [
        (["w4g32z"], "decodes all weights while loading"),
        (["w4g32z", "w8"], "transformers does not"),
        (["w4g32", "w8"], "wrong weights"),
        (["w3"], "before compressed-tensors 0.18"),
    ],
)
def test_what_a_recipe_costs_is_said(schemes: list[str], word: str) -> None:
    contents = contents_of(*(StoredTensor(f"l{i}", parse(s), (64, 64)) for i, s in enumerate(schemes)))
    reading = CT.reading({}, contents, Host())
    assert any(word in note for note in format.portability(contents, [], reading))


def test_splitting_what_vllm_fuses_is_said() -> None:
    contents = contents_of(StoredTensor("q_proj", parse("w4"), (64, 64)))
    assert format.portability(contents, [("q_proj",)], Reading()) == []
    assert format.portability(contents, [("q_proj", "k_proj")], Reading()) == [
        "q_proj, k_proj are float and w4: vLLM fuses them and refuses"
    ]


# ---- reading strangers' folders --------------------------------------------------------------------------------------


def folder_of(tmp_path: Path, fmt: format.Format, *stored: StoredTensor) -> Path:
    tensors: dict[str, torch.Tensor] = {"norm.weight": torch.ones(4)}
    for p in stored:
        tensors |= fmt.encode(p, encoded(random_weight(*p.shape, dtype=p.source_dtype), p.scheme))
    save_file(tensors, tmp_path / "model.safetensors")
    config, contents = {"model_type": "llama"}, contents_of(*stored)
    written = fmt.config(config, contents, fmt.reading(config, contents, Host()))
    (tmp_path / "config.json").write_text(json.dumps(written))
    return tmp_path


@pytest.mark.parametrize("names", [[name] for name in CT_SCHEMES] + [["w4g32", "w3g32z", "w8a8", "w8a8s", "w8"]])
def test_contents_are_read_back_from_the_tensors(tmp_path: Path, names: list[str]) -> None:
    stored = [StoredTensor(f"layers.{i}", parse(n), (9, 64), source_dtype=torch.bfloat16) for i, n in enumerate(names)]
    for i, fmt in enumerate((CT, OWN)):
        (tmp_path / str(i)).mkdir()
        checkpoint = Checkpoint.open(folder_of(tmp_path / str(i), fmt, *stored))
        assert format.of_folder(checkpoint) == fmt
        assert fmt.contents(checkpoint) == contents_of(*stored)


def edit(folder: Path, old: str, new: str) -> Checkpoint:
    path = folder / "config.json"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    return Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"num_bits": 4', '"num_bits": 3'),
        ('"num_bits": 4', '"num_bits": 4.0'),
        ('"group_size": 32', '"group_size": 16'),
        ('"group_size": 32', '"group_size": 0'),
        ('"symmetric": true', '"symmetric": false'),
        ('"type": "int"', '"type": "float"'),
        ('"strategy": "group"', '"strategy": "block"'),
        ('"input_activations": null', '"input_activations": {"num_bits": 4}'),
        ('"quantization_status": "compressed"', '"quantization_status": "frozen"'),
        ('"config_groups"', '"config_group"'),
    ],
)
def test_a_config_that_does_not_fit_its_tensors_is_refused(tmp_path: Path, old: str, new: str) -> None:
    checkpoint = edit(folder_of(tmp_path, CT, StoredTensor("layers.0", parse("w4g32"), (9, 64))), old, new)
    with pytest.raises(CheckpointError):
        CT.contents(checkpoint)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"dynamic": false}', '"dynamic": true}'),
        ('"strategy": "tensor"', '"strategy": "token"'),
        ('"strategy": "tensor"', '"strategy": "channel"'),
        ('"symmetric": true, "group_size": null, "observer": null', '"symmetric": false'),
    ],
)
def test_other_activations_than_the_tensors_have_are_refused(tmp_path: Path, old: str, new: str) -> None:
    checkpoint = edit(folder_of(tmp_path, CT, StoredTensor("layers.0", parse("w8a8s"), (9, 64))), old, new)
    with pytest.raises(CheckpointError):
        CT.contents(checkpoint)


@pytest.mark.parametrize("value", [0.0, -0.5, math.nan, math.inf])
@pytest.mark.parametrize("fmt", [CT, OWN], ids=lambda fmt: fmt.name)
def test_a_scale_of_activations_that_is_none_is_refused(fmt: format.Format, value: float) -> None:
    stored = StoredTensor("a.b", parse("w8a8s"), (16, 32))
    tensors = fmt.encode(stored, encoded(random_weight(16, 32), stored.scheme))
    with pytest.raises(CheckpointError, match=r"a\.b: a scale of activations of"):
        fmt.decode(stored, {**tensors, "a.b.input_scale": torch.tensor([value])})


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"w4g32"', '"w4g16"'),
        ('"w4g32"', '"w9"'),
        ('"w4g32"', "4"),
        ("[9, 64]", "[9, 96]"),
        ("[9, 64]", "[-9, 64]"),
        ("[9, 64]", "[1e300, 64]"),
        ("[9, 64]", "64"),
        ('"linear"', "3"),
        ('"float32"', '"int8"'),
        ('"layers.0"', '"layers.1"'),
        ('["layers.0"]', "null"),
        ('"version": 1', '"version": 2'),
        ('"tensors"', '"tensor"'),
    ],
)
def test_a_table_that_does_not_fit_its_tensors_is_refused(tmp_path: Path, old: str, new: str) -> None:
    checkpoint = edit(folder_of(tmp_path, OWN, StoredTensor("layers.0", parse("w4g32"), (9, 64))), old, new)
    with pytest.raises(CheckpointError):
        OWN.contents(checkpoint)


def test_other_tools_folders_are_refused_and_float_ones_are_not(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "quip"}}')
    with pytest.raises(CheckpointError, match="'quip'"):
        format.of_folder(Checkpoint.open(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert format.of_folder(Checkpoint.open(tmp_path)) is None


# ---- a new one -------------------------------------------------------------------------------------------------------

NEW_FORMAT = '''
"""Codes as they are, a byte each, with their scales behind them in one tensor: for programs that unpack nothing."""
from dataclasses import dataclass
import torch
from spicerack.numerics.qtensor import QTensor
from spicerack.numerics.scheme import parse
from spicerack.storage.format import Reading, StoredTensor

@dataclass(frozen=True)
class Plain:
    name: str = "plain"
    rank: int = 5
    read_by_others: bool = True
    on_request: bool = False

    def obstacles(self, contents):
        return [f"{p.module}: plain has only w6" for p in contents.values() if p.scheme.name != "w6"]

    def layout(self, stored):
        n, k = stored.shape
        return {f"{stored.module}.bytes": ("I8", (n, k + 2))}

    def encode(self, stored, q):
        scale = q.plain_scale.view(torch.int8).reshape(len(q.codes), 2)
        return {f"{stored.module}.bytes": torch.cat([q.codes, scale], 1)}

    def decode(self, stored, tensors):
        codes, scale = tensors[f"{stored.module}.bytes"].split([stored.shape[1], 2], 1)
        return QTensor(stored.scheme, codes.contiguous(), scale.contiguous().view(torch.float16))

    def undecoded(self, stored, tensors):
        return None

    def reading(self, config, contents, host):
        return Reading()

    def config(self, config, contents, reading):
        return {**config, "quantization_config": {"quant_method": "plain"}}

    def recognizes(self, config):
        return config.get("quantization_config") == {"quant_method": "plain"}

    def float_config(self, config):
        return {key: value for key, value in config.items() if key != "quantization_config"}

    def contents(self, checkpoint):
        names = {n.removesuffix(".bytes"): i.shape for n, i in checkpoint.tensors.items() if n.endswith(".bytes")}
        return {m: StoredTensor(m, parse("w6"), (n, k - 2)) for m, (n, k) in names.items()}

    def notes(self, contents, fused, reading):
        return ["six bits in eight"]

FORMAT = Plain()
'''


def test_a_new_format_is_one_file_from_a_recipe_to_bytes_and_back(tmp_path: Path, llama_folder: LlamaFolder) -> None:
    folder, out = llama_folder(), tmp_path / "out"
    with dropped(formats, tmp_path, "plain", NEW_FORMAT):
        recipe = Recipe(parse("w6"), rules=(Rule("model.layers.0.**", None),))
        spicerack.quantize(folder, recipe, output=out)
        checkpoint = Checkpoint.open(out)
        assert checkpoint.config["quantization_config"] == {"quant_method": "plain"}
        fmt = format.of_folder(checkpoint)
        assert fmt is not None and fmt.name == "plain" and len(fmt.contents(checkpoint)) == 7
        model, floats = spicerack.load(out), spicerack.load(folder)
        for name in fmt.contents(checkpoint):
            wanted = codec.encode(floats.get_submodule(name).weight.detach(), parse("w6"))
            assert same(model.get_submodule(name).packed.qtensor(), wanted)
        assert format.portability(fmt.contents(checkpoint), [], Reading()) == ["six bits in eight"]
        # What it does not hold goes where it went without the file, and so does what others hold no more.
        assert format.choose(contents_of(StoredTensor("a", parse("w4"), (64, 64)))) == CT
        assert format.choose(contents_of(StoredTensor("a", parse("nf4"), (64, 64)))) == OWN
    assert format.choose(contents_of(StoredTensor("a", parse("w6"), (64, 64)))) == CT


def test_formats_have_ranks_of_their_own_and_the_container_the_last() -> None:
    ranks = [fmt.rank for fmt in format.ranked()]
    assert len(set(ranks)) == len(ranks) and format.ranked()[-1] == OWN


@pytest.mark.parametrize("role", ["linear", "embedding", "experts"])
@pytest.mark.parametrize("name", ["w8", "w4g32z", "w8a8", "w2g32h", "ternary", "ternarya8", "nf4", "q4_k", "nvfp4"])
def test_layouts_choose_the_format_that_formats_choose(name: str, role: str) -> None:
    """What weighs folders without torch goes by its own order of formats: it is theirs."""
    shape = (4, 512, 256) if role == "experts" else (512, 256)
    stored = StoredTensor("m.layer", parse(name), shape, role)
    chosen = format.choose({stored.module: stored})
    layout = layouts.choose([stored.matrix])
    assert stored.laid_out(layout) == chosen.layout(stored)
