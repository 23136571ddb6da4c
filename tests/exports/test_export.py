"""Export and import: codes stay what they are, or layer, rule and what would do are named, and no file is left."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import spicerack
from spicerack import plugins
from spicerack.cli import _output, cli
from spicerack.errors import CheckpointError, OutputError, SchemeError, UsageError, WeightError
from spicerack.exports import equality, readings, target, verify
from spicerack.exports.readers import own
from spicerack.exports.source import Source
from spicerack.exports.targets import folders as folder_targets
from spicerack.numerics import codec, packed, rounding
from spicerack.numerics.qtensor import QTensor
from spicerack.numerics.scheme import parse
from spicerack.numerics.undecoded import Undecoded
from spicerack.runtime.folder import Folder
from spicerack.storage import format as formats
from spicerack.storage import holding, ledger
from spicerack.storage.format import StoredTensor
from spicerack.storage.reader import Checkpoint

MADE = Callable[[str], Path]
READERS = ("mlx", "mlx_lm", "compressed_tensors", "gguf", "gptqmodel")
"""Packages whose code reads back what was exported."""


@pytest.fixture(scope="module")
def floating(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0},
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("float") / "model"
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def quantized(floating: Path) -> MADE:
    def make(scheme: str) -> Path:
        output = floating.parent / scheme
        if not output.exists():
            spicerack.quantize(floating, scheme, output=output)
        return output

    return make


@pytest.fixture
def own_reader(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As where no engine's own reader is installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in READERS else find(name, *rest))
    yield


def weights(folder: Path) -> dict[str, QTensor]:
    opened = Folder.open(folder)
    return {module: opened.packed(stored) for module, stored in opened.contents.items()}


def same(a: dict[str, QTensor], b: dict[str, QTensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[m].scheme == b[m].scheme and torch.equal(a[m].codes, b[m].codes)
        and torch.equal(a[m].plain_scale, b[m].plain_scale)
        and (a[m].zero is None or torch.equal(a[m].zero, b[m].zero))  # type: ignore[arg-type]
        for m in a
    )  # fmt: skip


@pytest.mark.parametrize("to", ["gptq", "awq", "mlx", "compressed-tensors", "spicerack"])
@pytest.mark.parametrize("scheme", ["w4g32", "w4g32z"])
@pytest.mark.usefixtures("own_reader")
def test_there_and_back_every_code_is_the_same(quantized: MADE, tmp_path: Path, to: str, scheme: str) -> None:
    source, out, back = quantized(scheme), tmp_path / "out", tmp_path / "back"
    written = spicerack.export(source, to=to, output=out)
    assert (written.to, written.packed, written.rounded, written.foreign) == (to, 7, (), False)
    assert "second decoder" in written.verified_by
    assert same(weights(out), weights(source))
    read = ledger.read(out)
    before = ledger.read(source)
    assert read is not None and before is not None
    assert read.identity["exported"]["verified_by"] == written.verified_by
    assert (read.recipe, len(read.entries)) == (before.recipe, len(before.entries))
    spicerack.import_model(out, output=back)
    assert same(weights(back), weights(source))
    assert not [path for path in tmp_path.iterdir() if path.name not in ("out", "back")]


@pytest.mark.parametrize("scheme", ["nf4", "w2g32h", "w8t"])
@pytest.mark.usefixtures("own_reader")
def test_our_own_container_is_a_target_too(quantized: MADE, tmp_path: Path, scheme: str) -> None:
    written = spicerack.export(quantized(scheme), to="spicerack", output=tmp_path / "out")
    assert (written.foreign, written.rounded) == (False, ())
    before, after = weights(quantized(scheme)), weights(tmp_path / "out")
    assert all(torch.equal(codec.decode(after[module]), codec.decode(q)) for module, q in before.items())


@pytest.mark.parametrize("scheme", [*plugins.names("numerics.schemes"), "w2g32h", "w4g32m", "w4g64z", "w5t", "w3g64f"])
def test_every_scheme_is_decoded_a_second_time(scheme: str) -> None:
    draw = torch.Generator().manual_seed(0)
    q = codec.encode(torch.randn(16, 512, generator=draw), parse(scheme))
    tensors = packed.pack(q)

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        return (tensor.float() if tensor.dtype == torch.float8_e8m0fnu else tensor).numpy()

    decoded = own.ours(read, q.scheme, q.shape)
    values = decoded.values() if isinstance(decoded, readings.Grid) else decoded
    assert torch.equal(values, codec.decode(q))
    if isinstance(decoded, readings.Grid):
        assert equality.different(q, decoded) is None


@pytest.mark.parametrize(
    ("to", "scheme"),
    [
        ("gptq", "w3g32"),
        ("gptq", "w8z"),
        ("awq", "w4g32z"),
        ("mlx", "w6g32z"),
        ("mlx", "w4g32"),
        ("compressed-tensors", "w5g32z"),
    ],
)
def test_words_are_laid_out_anew_as_codes_are_packed(to: str, scheme: str) -> None:
    fmt, draw = folder_targets._format(to), torch.Generator().manual_seed(0)
    q = codec.encode(torch.randn(64, 96, generator=draw).half(), parse(scheme))
    [stored] = fmt.prepared({"a": StoredTensor("a", q.scheme, (64, 96), source_dtype=torch.float16)}).values()
    u = packed.undecoded(q.scheme, (64, 96), packed.pack(q))
    encoded, relaid = fmt.encode(stored, q), fmt.relaid(stored, u)
    assert relaid is not None and list(relaid) == list(encoded)
    assert all(torch.equal(relaid[name], tensor) for name, tensor in encoded.items())


@pytest.mark.parametrize(
    ("to", "scheme"), [("gptq", "w4g32"), ("awq", "w4g32"), ("mlx", "w4g32"), ("gptq", "w4z"), ("awq", "w4z")]
)
@pytest.mark.usefixtures("own_reader")
def test_what_was_exported_runs_here_as_its_source_does(quantized: MADE, tmp_path: Path, to: str, scheme: str) -> None:
    spicerack.export(quantized(scheme), to=to, output=tmp_path / "out")
    ids = torch.arange(16)[None]
    with torch.no_grad():
        one, other = (spicerack.load(path)(ids).logits for path in (quantized(scheme), tmp_path / "out"))
    assert torch.equal(one, other)


@pytest.mark.usefixtures("own_reader")
def test_config_json_has_the_old_names_too(quantized: MADE, tmp_path: Path, floating: Path) -> None:
    spicerack.export(quantized("w4g32"), to="gptq", output=tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["torch_dtype"], config["rope_theta"]) == ("float32", 5000.0)
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    section = config.pop("quantization_config")
    assert section == {
        "quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True,
        "checkpoint_format": "gptq", "true_sequential": True, "damp_percent": 0.01, "lm_head": False,
        "pack_dtype": "int32",
    }  # fmt: skip
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "config.json").write_text(json.dumps(config))
    one, other = (AutoConfig.from_pretrained(path).to_dict() for path in (floating, tmp_path / "again"))
    for key in ("rope_parameters", "dtype"):
        assert one[key] == other[key]
    two_kinds = {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}}
    old = folder_targets.with_old_names({"text_config": two_kinds})["text_config"]
    assert (old["rope_theta"], old["rope_local_base_freq"]) == (1e6, 1e4)


@pytest.mark.usefixtures("own_reader")
@pytest.mark.parametrize(
    ("scheme", "to", "said"),
    [("ternary", "bitnet", "are rounded to int8 there"), ("w8a8", "gptq", "stay floats there")],
)
def test_inputs_that_are_treated_otherwise_are_told(
    quantized: MADE, tmp_path: Path, scheme: str, to: str, said: str
) -> None:
    written = spicerack.export(quantized(scheme), to=to, output=tmp_path / "out")
    assert written.rounded == ()
    assert any(said in note for note in written.notes)


# ---- in another scheme -----------------------------------------------------------------------------------------------

EXACT = [
    ("w3g64", "w4g64"), ("w4", "w4g64"), ("w4g64", "w4g32z"), ("w2g32h", "w3g32"), ("ternary", "w2g32"),
    ("w4g32z", "w8g32z"), ("w4g64m", "w4g32m"), ("w8a8", "w8"), ("w8t", "w8g32"), ("mxfp4", "mxfp4"),
]  # fmt: skip
NOT = [
    ("w4g64", "w3g64"), ("w4g32", "w4g64"), ("w4g32z", "w4g32"), ("w4g32", "w4g32m"), ("nf4", "w8g32"),
    ("w4g32", "w4g32h"), ("w2g32h", "w2g32"), ("q4_k", "w4g32m"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "wanted"), EXACT)
def test_the_same_in_more_bits(given: str, wanted: str) -> None:
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)) * 0.05
    q = rounding.to_nearest(w, parse(given))
    assert holding.obstacle(parse(given), parse(wanted), (8, 64)) is None
    other = holding.convert(q, StoredTensor("a", parse(wanted), (8, 64)))
    assert other.scheme == parse(wanted)
    assert torch.equal(codec.decode(other), codec.decode(q))


@pytest.mark.parametrize(("given", "wanted"), NOT)
def test_what_says_less(given: str, wanted: str) -> None:
    assert holding.obstacle(parse(given), parse(wanted), (256, 256)) is not None


@pytest.mark.parametrize(
    ("to", "given", "scheme", "exact"),
    [
        ("gptq", "w4g32z", "w4g32z", True),
        ("gptq", "ternary", "w2", True),
        ("gptq", "w5g32", "w8g32", True),
        ("gptq", "w6", "w8", True),
        ("awq", "w3g32", "w4g32", True),
        ("awq", "w8g32", "w4g16z", False),
        ("mlx", "w4", "w4g64", True),
        ("mlx", "w7g64", "w8g64", True),
        ("mlx", "w4g16", "w4g32m", False),
        ("mlx", "w2g32h", "w2g32h", True),
        ("mlx", "mxfp4", "mxfp4", True),
        ("compressed-tensors", "w2g32h", "w3g32", True),
    ],
)
def test_the_smallest_scheme_that_says_the_same_or_the_nearest(to: str, given: str, scheme: str, exact: bool) -> None:
    contents = {"a.0.b": StoredTensor("a.0.b", parse(given), (64, 64))}
    held = holding.hold(target.Asked(target.find(to), to), contents)["a.0.b"]
    assert (held.stored.scheme.name, held.exact) == (scheme, exact)
    assert (held.rule is None) == (scheme == given)


@pytest.mark.usefixtures("own_reader")
def test_layers_of_several_schemes_become_the_one_that_holds_all(floating: Path, tmp_path: Path) -> None:
    rules = ["model.layers.*.mlp.down_proj=w3g32z", "model.layers.*.mlp.up_proj=w4"]
    spicerack.quantize(floating, "w4g32", rules=rules, output=tmp_path / "mixed")
    written = spicerack.export(tmp_path / "mixed", to="gptq", output=tmp_path / "out")
    assert written.rounded == ()
    before, after = weights(tmp_path / "mixed"), weights(tmp_path / "out")
    assert {q.scheme.name for q in after.values()} <= {"w4g32", "w4g32z"}
    for module, q in before.items():
        assert torch.equal(codec.decode(after[module]), codec.decode(q))
    events = [entry.events for entry in ledger.read(tmp_path / "out").entries if "down_proj" in entry.tensor]  # type: ignore[union-attr]
    assert events == [("w3g32z in the source, said in w4g32z",)]


@pytest.mark.usefixtures("own_reader")
def test_what_old_tools_look_for_lies_beside_and_does_not_go_on(quantized: MADE, tmp_path: Path) -> None:
    spicerack.export(quantized("w4g32"), to="gptq", output=tmp_path / "gptq")
    section = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    assert json.loads((tmp_path / "gptq" / "quantize_config.json").read_text()) == section
    spicerack.export(tmp_path / "gptq", to="mlx", output=tmp_path / "mlx")
    assert not (tmp_path / "mlx" / "quantize_config.json").exists()


# ---- refused, and rounded again --------------------------------------------------------------------------------------


def test_a_family_that_no_engine_of_the_format_has_is_told(quantized: MADE, tmp_path: Path) -> None:
    config = BertConfig(vocab_size=99, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    BertModel(config).save_pretrained(tmp_path / "bert")
    spicerack.quantize(tmp_path / "bert", "w4g32", output=tmp_path / "out")
    told = spicerack.export(tmp_path / "out", to="mlx", output=tmp_path / "mlx")
    assert any("mlx does not read the family 'bert'" in note for note in told.notes)
    llama = spicerack.export(quantized("w4g32"), to="mlx", output=tmp_path / "llama")
    assert not any("does not read the family" in note for note in llama.notes)


def nothing_but(folder: Path, *names: str) -> bool:
    return sorted(path.name for path in folder.iterdir()) == sorted(names)


def test_what_is_not_held_is_refused_by_layer_rule_and_nearest_scheme(quantized: MADE, tmp_path: Path) -> None:
    with pytest.raises(
        SchemeError,
        match=r"^model\.layers\.0\.mlp\.down_proj, \S+, \S+ and 4 more layers: awq has no 8 bits \(w8g32\), only 4 "
        r"\(nearest: w4g\d+z?\) \(--requantize",
    ):
        spicerack.export(quantized("w8g32"), to="awq", output=tmp_path / "out")
    assert nothing_but(tmp_path)


@pytest.mark.usefixtures("own_reader")
def test_requantizing_says_what_it_costs(quantized: MADE, tmp_path: Path) -> None:
    written = spicerack.export(quantized("w8g32"), to="awq", output=tmp_path / "out", requantize=True)
    [rounded] = written.rounded
    before, after = weights(quantized("w8g32")), weights(tmp_path / "out")
    pairs = [(codec.decode(before[m]).double(), codec.decode(after[m]).double()) for m in before]
    wrong = sum(float((a - b).square().sum()) for a, b in pairs) / sum(float(a.square().sum()) for a, _ in pairs)
    assert rounded.error == pytest.approx(wrong**0.5, rel=1e-3)
    assert (rounded.count, rounded.given) == (7, "w8g32")
    assert 0.01 < rounded.error < 0.2
    assert written.added_kl is None  # there is no text
    assert written.as_dict()["exact"] is False


@pytest.mark.usefixtures("own_reader")
def test_requantizing_is_measured_on_a_text(llama_folder: Callable[..., Path], tmp_path: Path) -> None:
    source = llama_folder(vocab_size=288)
    spicerack.quantize(source, "w8g32", output=tmp_path / "q")
    text = tmp_path / "text.txt"
    text.write_text("what was lost is measured, not guessed. " * 40)
    line = ["export", tmp_path / "q", "--to", "awq", "-o", tmp_path / "out", "--requantize", "--text", text]
    assert _output.run(cli, list(map(str, line))) == 0
    figures = spicerack.evaluate(tmp_path / "out", against=source, text=text)
    (tmp_path / "q" / "heldout.txt").write_text(text.read_text())
    written = spicerack.export(tmp_path / "q", to="awq", output=tmp_path / "again", requantize=True)
    assert written.added_kl == pytest.approx(figures["kl_mean"], rel=0.2)  # eight bits are nearly the float model
    assert _output.run(cli, [*map(str, line[:-3]), "--text", str(text)]) == 2


def test_scales_that_float16_does_not_hold_are_named_before_a_byte_is_written(floating: Path, tmp_path: Path) -> None:
    tensors = load_file(floating / "model.safetensors")
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1e-6
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(floating)).bfloat16()
    model.load_state_dict(tensors)
    model.save_pretrained(tmp_path / "narrow")
    spicerack.quantize(tmp_path / "narrow", "w4g32", output=tmp_path / "q")
    with pytest.raises(WeightError, match=r"up_proj: scale \[\d+, \d\] is \S+, which float16 does not hold"):
        spicerack.export(tmp_path / "q", to="gptq", output=tmp_path / "out")
    assert nothing_but(tmp_path, "narrow", "q")
    assert same(weights(spicerack.export(tmp_path / "q", to="mlx", output=tmp_path / "mlx").output),
                weights(tmp_path / "q"))  # fmt: skip


class Wrong:
    name, foreign = "somebody", True

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def obstacle(self, to: str, source: Source) -> str | None:
        return None

    def opened(self, path: Path, source: Source) -> readings.Weights:
        def read(name: str) -> torch.Tensor | readings.Grid:
            module = name.removesuffix(".weight")
            packed = module in source.contents
            value = codec.decode(source.packed(module)) if packed else source.float(name).clone()
            if self.fault == name:
                value.view(-1)[7] *= 1 + 2**-20
            if self.fault == f"no {name}":
                raise KeyError(name)
            return value[:-1] if self.fault == f"short {name}" else value

        return read


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("model.layers.0.mlp.up_proj.weight", r"up_proj.weight: somebody reads \S+ at 7, where"),
        ("model.norm.weight", "norm.weight: somebody reads"),
        ("no lm_head.weight", "lm_head.weight is not in what was written"),
        ("short model.layers.0.mlp.up_proj.weight", "numbers, and too few"),
    ],
)
def test_what_is_not_read_back_is_not_there(
    quantized: MADE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, message: str
) -> None:
    monkeypatch.setattr(verify, "choose", lambda to, source: Wrong(fault))
    with pytest.raises(OutputError, match=message):
        spicerack.export(quantized("w4g32"), to="gptq", output=tmp_path / "out")
    assert nothing_but(tmp_path)


@pytest.mark.parametrize(
    ("to", "part", "differs"),
    [
        ("gptq", "qweight", "codes"),
        ("gptq", "qzeros", "zero points"),
        ("gptq", "scales", "scales"),
        ("awq", "qweight", "codes"),
        ("awq", "qzeros", "zero points"),
        ("mlx", "weight", "codes"),
        ("mlx", "biases", "biases"),
        ("compressed-tensors", "weight_packed", "codes"),
    ],
)
@pytest.mark.usefixtures("own_reader")
def test_the_second_decoder_sees_a_wrong_writer(
    quantized: MADE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, part: str, differs: str
) -> None:
    kind = type(folder_targets._format(to))
    relaid = kind.relaid

    def shifted(self: object, stored: StoredTensor, u: Undecoded) -> dict[str, torch.Tensor]:
        tensors = relaid(self, stored, u)
        name = f"{stored.module}.{part}"
        raw = tensors[name].contiguous().view(torch.int8).clone()
        raw.view(-1)[5 * raw.numel() // 8] ^= 1
        return {**tensors, name: raw.view(tensors[name].dtype)}

    monkeypatch.setattr(kind, "relaid", shifted)
    with pytest.raises(OutputError, match=f"second decoder reads other {differs}"):
        spicerack.export(quantized("w4g32"), to=to, output=tmp_path / "out")
    assert nothing_but(tmp_path)


def test_what_is_asked_for_in_vain(quantized: MADE, floating: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    cases: list[tuple[Path, dict[str, object], str]] = [
        (quantized("w4g32"), {"to": "zip", "output": tmp_path / "out"}, "nothing is exported to 'zip'.*gptq"),
        (quantized("w4g32"), {"to": "gptq", "output": tmp_path / "there"}, "exists"),
        (floating, {"to": "gptq", "output": tmp_path / "out"}, "is not quantized.*--scheme"),
        (quantized("w4g32"), {"to": "gptq", "scheme": "w4g32", "output": tmp_path / "out"}, "is quantized already"),
    ]
    for model, options, message in cases:
        with pytest.raises(UsageError, match=message):
            spicerack.export(model, **options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="has nothing quantized"):
        spicerack.import_model(floating, output=tmp_path / "out")
    assert nothing_but(tmp_path, "there")


@pytest.mark.usefixtures("own_reader")
def test_from_float_and_by_the_command_line(floating: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["export", floating, "--to", "mlx", "--scheme", "w4g32", "-o", tmp_path / "out", "--json"]
    assert _output.run(cli, list(map(str, line))) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["to"], told["packed"], told["exact"], told["foreign"]) == ("mlx", 7, True, False)
    assert nothing_but(tmp_path, "out")
    assert _output.run(cli, ["import", str(tmp_path / "out"), "-o", str(tmp_path / "back")]) == 0
    assert "every weight is what it was meant to be" in capsys.readouterr().out
    assert _output.run(cli, ["export", str(tmp_path / "back"), "--to", "x", "-o", str(tmp_path / "no")]) == 2
    assert _output.run(cli, ["import_", str(tmp_path / "out"), "-o", str(tmp_path / "no")]) == 2


def test_a_gguf_file_becomes_a_folder_with_its_tokenizer(llama_folder: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    source = llama_folder(vocab_size=288)
    spicerack.quantize(source, "w4g32", output=tmp_path / "q")
    spicerack.export(tmp_path / "q", to="gguf", output=tmp_path / "m.gguf")
    spicerack.import_model(tmp_path / "m.gguf", output=tmp_path / "back")
    assert same(weights(tmp_path / "back"), weights(tmp_path / "q"))
    one, other = (AutoTokenizer.from_pretrained(path) for path in (source, tmp_path / "back"))
    assert one("what, now?").input_ids == other("what, now?").input_ids


def test_a_stranger_s_folder_with_a_fault_is_refused_by_import(quantized: MADE, tmp_path: Path) -> None:
    spicerack.export(quantized("w4g32"), to="gptq", output=tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.scales"][0, 0] = torch.inf
    save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj\.scales: one of them is not finite"):
        spicerack.import_model(tmp_path / "out", output=tmp_path / "back")
    assert nothing_but(tmp_path, "out")


# ---- others read it --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["w4g32", "w4g32z", "w3g64", "w8a8"])
def test_compressed_tensors_decodes_what_we_do(quantized: MADE, tmp_path: Path, scheme: str) -> None:
    written = spicerack.export(quantized(scheme), to="compressed-tensors", output=tmp_path / "out")
    assert written.foreign and written.verified_by.startswith("compressed-tensors 0.")


@pytest.mark.parametrize("scheme", ["w4g32", "w4g32z"])
def test_mlx_lm_computes_what_the_decoded_weights_do(quantized: MADE, tmp_path: Path, scheme: str) -> None:
    mx = pytest.importorskip("mlx.core")
    from mlx_lm.utils import load_model

    written = spicerack.export(quantized(scheme), to="mlx", output=tmp_path / "out")
    assert written.foreign and written.verified_by.startswith("mlx 0.")
    ids = torch.arange(16)[None]
    model = spicerack.load(quantized(scheme), compute="float")
    with torch.no_grad():
        ours = model(ids).logits
    theirs = torch.from_numpy(np.array(load_model(tmp_path / "out")[0](mx.array(ids.numpy()))))
    assert float((ours - theirs).abs().max()) < 3e-5  # they add in another order


def test_what_mlx_lm_quantized_runs_here_and_is_imported(floating: Path, tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core")
    import mlx.nn as mlx_nn
    from mlx_lm.utils import load_model, save_config, save_model

    old = {"rope_theta": 5000.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}  # names that mlx-lm looks for
    model, config = load_model(floating, model_config=old)
    mlx_nn.quantize(model, group_size=32, bits=4)  # the embedding and the head, too
    save_model(tmp_path / "mlx", model)
    config["quantization"] = config["quantization_config"] = {"group_size": 32, "bits": 4}
    save_config(config, tmp_path / "mlx" / "config.json")
    ids = torch.arange(16)[None]
    theirs = torch.from_numpy(np.array(model(mx.array(ids.numpy()))))
    spicerack.import_model(tmp_path / "mlx", output=tmp_path / "ours")
    for folder in (tmp_path / "mlx", tmp_path / "ours"):
        contents = Folder.open(folder).contents
        assert {stored.scheme.name for stored in contents.values()} == {"w4g32mf"}  # the model is float32
        with torch.no_grad():
            assert float((spicerack.load(folder, compute="float")(ids).logits - theirs).abs().max()) < 3e-5
    roles = {module: stored.role for module, stored in Folder.open(tmp_path / "ours").contents.items()}
    assert (roles["model.embed_tokens"], roles["lm_head"]) == ("embedding", "head")


@pytest.mark.interop
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("to", "scheme"), [("gptq", "w4g32"), ("gptq", "w4g32z"), ("gptq", "w8g32"), ("awq", "w4g32z")]
)
def test_transformers_runs_it_with_gptqmodel(
    quantized: MADE, tmp_path: Path, to: str, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gptqmodel")
    pytest.importorskip("optimum")
    from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig

    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # it compiles for a minute else
    written = spicerack.export(quantized(scheme), to=to, output=tmp_path / "out")
    assert written.foreign and written.verified_by.startswith("gptqmodel ")
    chosen = GPTQConfig(bits=4, backend="gptq_torch") if to == "gptq" else AwqConfig(backend="torch_awq")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=chosen, dtype=torch.float16)
    ids = torch.arange(16)[None]
    with torch.no_grad():
        theirs, ours = model(ids).logits.float(), spicerack.load(quantized(scheme), compute="float")(ids).logits
    assert float((theirs - ours).abs().max()) < 0.01 * float(ours.abs().max())  # it computes in float16


def test_what_mlx_quantized_is_read_as_mlx_decodes_it(tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core")
    w = torch.randn(32, 128, generator=torch.Generator().manual_seed(0)).numpy()
    cases = [("affine", 64, bits) for bits in (2, 3, 4, 5, 6, 8)] + [("mxfp4", 32, 4), ("nvfp4", 16, 4)]
    for mode, group, bits in cases:
        parts = mx.quantize(mx.array(w), group_size=group, bits=bits, mode=mode)
        names = ("a.weight", "a.scales", "a.biases")
        folder = tmp_path / f"{mode}{bits}"
        folder.mkdir()
        mx.save_safetensors(str(folder / "model.safetensors"), dict(zip(names, parts, strict=False)))
        section = {"group_size": group, "bits": bits, "mode": mode}
        (folder / "config.json").write_text(json.dumps({"model_type": "x", "quantization": section}))
        checkpoint = Checkpoint.open(folder)
        fmt = formats.of_folder(checkpoint)
        assert fmt is not None
        [stored] = fmt.contents(checkpoint).values()
        q = fmt.decode(stored, {name: checkpoint.read(name) for name in fmt.layout(stored)})
        wanted = mx.dequantize(*parts, group_size=group, bits=bits, mode=mode, dtype=mx.float32)
        assert np.array_equal(codec.decode(q).numpy(), np.array(wanted)), (mode, bits, stored.scheme.name)
