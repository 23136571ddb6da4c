"""What is refused of a folder before the first byte, what is told of it, and that `save` asks the same."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import families
import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import spicerack
from spicerack.algorithms.method import Method
from spicerack.errors import CheckpointError, LoadError, RecipeError, UsageError
from spicerack.models.architecture import stranger
from spicerack.models.overview import look
from spicerack.numerics.scheme import parse
from spicerack.quantization.door import promised
from spicerack.quantization.job import Job, prepare
from spicerack.quantization.recipe import Recipe, decided, rule
from spicerack.storage import ledger
from spicerack.storage.reader import Checkpoint

Tensors = dict[str, torch.Tensor]
IDS = torch.arange(3, 11)[None]


def changed(folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """The folder with other tensors in its file."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    return folder


def configured(folder: Path, **settings: object) -> Path:
    """The folder with other values in config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


def job(folder: Path, scheme: str = "w8", *rules: str, with_text: bool = False) -> Job:
    return prepare(folder, Recipe(parse(scheme), rules=tuple(map(rule, rules))), with_text=with_text)


def schemes(made: Job) -> dict[str, str]:
    """Module -> scheme, of what is quantized."""
    return {a.stored.module: a.stored.scheme.name for a in made.actions if a.stored is not None}


def family(name: str, folder: Path) -> Path:
    """A tiny model of a family of `families`, or of one that sees pictures."""
    if name == "llava":
        config = transformers.LlavaConfig(
            text_config={**families.LLAMA, "model_type": "llama"},
            vision_config={**families.VISION, "model_type": "clip_vision_model"},
            image_token_index=90,
        )
        transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
        return folder
    families.build(name).save_pretrained(folder)
    return folder


def named(part: str) -> Callable[[Tensors], Tensors]:
    """Every name with `part` in front."""
    return lambda tensors: {f"{part}{name}": tensor for name, tensor in tensors.items()}


def stored_as(dtype: torch.dtype) -> Callable[[Tensors], Tensors]:
    """Linear layers in another type."""
    return lambda tensors: {n: t.to(dtype) if "proj" in n else t for n, t in tensors.items()}


def as_gptq(tensors: Tensors) -> Tensors:
    """Codes under another name, in place of weights."""
    codes = {n.replace("weight", "qweight"): t.int() for n, t in tensors.items() if "proj" in n}
    return codes | {n: t for n, t in tensors.items() if "proj" not in n}


def as_bitsandbytes(tensors: Tensors) -> Tensors:
    """Codes, and scales beside them."""
    return {**stored_as(torch.int8)(tensors), "model.layers.0.mlp.up_proj.SCB": torch.ones(4)}


def narrower(tensors: Tensors) -> Tensors:
    """Queries with fewer rows than config.json says."""
    return {n: t[:16].clone() if "q_proj" in n else t for n, t in tensors.items()}


def add_bias(model: nn.Module) -> None:
    model.model.layers[0].mlp.down_proj.bias = nn.Parameter(torch.ones(32))


@pytest.mark.parametrize(("change", "message"), [
    (named("_orig_mod."), r"does not find 21 of its parameters: names have '_orig_mod\.' in them, as torch.compile"),
    (named("module."), r"names have 'module\.' in them, as DataParallel writes them"),
    (named("student."), r"names have 'student\.' in them.*rename the tensors: without 'student\.' they fit"),
    (lambda ts: {n.replace("mlp.", "mlp._fsdp_wrapped_module."): t for n, t in ts.items()}, r"'_fsdp_wrapped_module"),
    (lambda ts: {n: t for n, t in ts.items() if "layers.1." not in n}, r"no tensor fills .*layers\.1\..* and 6 more"),
    (lambda ts: ts, None),
    (narrower, r"q_proj.weight is \[16, 64\], and LlamaForCausalLM has"),
    (stored_as(torch.int8), r"is quantized already: .*proj.weight is I8, and LlamaForCausalLM has floats there"),
    (stored_as(torch.float8_e4m3fn), r"is F8_E4M3, and LlamaForCausalLM has floats"),
    (as_bitsandbytes, "is I8, as bitsandbytes writes them, and Llama"),
    (as_gptq, r"qweight is I32, as GPTQ or AWQ writes them, and there is no weight beside it"),
])  # fmt: skip
def test_a_folder_that_does_not_fill_its_class_is_refused(
    llama_folder, tmp_path: Path, change: Callable[[Tensors], Tensors], message: str | None
) -> None:
    folder = changed(llama_folder(), change)
    if message is None:  # the same tensors
        job(folder)
        return
    with pytest.raises(CheckpointError, match=message):
        spicerack.quantize(folder, "w8", output=tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("name", ["bert-mlm", "gpt2", "mixtral", "qwen3", "t5", "vit", "llava", "whisper", "albert"])
def test_what_fills_its_class_passes_and_what_lacks_a_tensor_is_what_load_refuses(name: str, tmp_path: Path) -> None:
    folder = family(name, tmp_path / "m")
    job(folder)
    tensors = load_file(folder / "model.safetensors")
    victim = next(key for key, tensor in reversed(tensors.items()) if tensor.ndim > 1 and "position" not in key)
    changed(folder, lambda ts: {key: tensor for key, tensor in ts.items() if key != victim})
    with pytest.raises(LoadError):
        spicerack.load(folder)
    with pytest.raises(CheckpointError, match="no tensor fills"):
        job(folder)


@pytest.mark.parametrize(("settings", "message"), [
    ({"architectures": ["MistralForCausalLM"]}, "model_type 'llama' is not that of MistralForCausalLM.* 'mistral'"),
    ({"architectures": ["GPT2LMHeadModel"]}, "model_type 'llama' is not that of GPT2LMHeadModel, which is 'gpt2'"),
    ({"model_type": "bert"}, "model_type 'bert' is not that of LlamaForCausalLM, which is 'llama'"),
    ({"num_attention_heads": 3}, "hidden size .* is not a multiple of the number of attention heads"),
    ({"hidden_size": "64"}, "'hidden_size' expected int, got str"),
    ({"hidden_act": "nobody_knows"}, "KeyError: 'nobody_knows'"),
    ({"rope_parameters": {"rope_type": "nobody_knows"}}, "KeyError: 'nobody_knows'"),
    ({"dtype": "float99"}, "float99"),
])  # fmt: skip
def test_a_config_that_makes_no_model_is_refused_before_work_and_by_load(
    llama_folder, tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    folder = configured(llama_folder(), **settings)
    with pytest.raises(CheckpointError, match=message):
        spicerack.quantize(folder, "w8", output=tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    with pytest.raises((CheckpointError, LoadError)):
        spicerack.load(folder)


def test_families_that_use_the_classes_of_others_are_themselves() -> None:
    """The oracle is transformers' own table: EXAONE's models are Llama's."""
    config = transformers.AutoConfig.for_model("exaone", vocab_size=90, num_layers=1, hidden_size=32)
    model_class = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    assert not issubclass(type(config), model_class.config_class) and stranger(model_class, config) is None
    assert stranger(transformers.GPT2LMHeadModel, config)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.uint8, torch.int64, torch.float64])
def test_vectors_of_another_type_are_no_codes(llama_folder, dtype: torch.dtype, tmp_path: Path) -> None:
    """Norms of ones that were stored as whole numbers or as a mask: copied as they are, and computed with."""
    folder = llama_folder()
    ones = {"norm": lambda t: {n: torch.ones_like(v).to(dtype) if "norm" in n else v for n, v in t.items()}}
    changed(folder, ones["norm"])
    expected = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()(IDS).logits
    spicerack.quantize(folder, "w8", output=tmp_path / "out")
    kept = load_file(tmp_path / "out" / "model.safetensors")
    assert kept["model.norm.weight"].dtype == dtype
    computed = spicerack.load(tmp_path / "out")(IDS).logits
    assert (computed - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("rules", [["**.dense=w8"], ["cls.predictions.dense=w8"], ["**=w4g32"]])
def test_a_tensor_without_numbers_is_copied_whatever_is_asked_for_it(rules: list[str], tmp_path: Path) -> None:
    """MobileBERT as wide as its embeddings has one, [0, 300]; a rule that names it has all that there is."""
    sizes = {"hidden_size": 64, "embedding_size": 64, "intra_bottleneck_size": 64, "true_hidden_size": 64}
    config = transformers.MobileBertConfig(vocab_size=300, num_hidden_layers=1, intermediate_size=128, **sizes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that there is nothing to initialize
        model = transformers.MobileBertForMaskedLM(config).eval()
        model.save_pretrained(tmp_path / "model")
        spicerack.quantize(tmp_path / "model", "w4g32", rules=rules, output=tmp_path / "out")
        folder, module = spicerack.load(tmp_path / "out"), spicerack.quantize(model, "w4g32", rules=rules)
    assert folder.cls.predictions.dense.weight.shape == module.cls.predictions.dense.weight.shape == (0, 300)
    expected = model(IDS).logits
    for small in (folder, module):
        assert (small(IDS).logits - expected).norm() < 0.2 * expected.norm()


def test_layers_in_front_of_blocks_are_told_where_text_chooses_codes(tmp_path: Path) -> None:
    """Gemma 4 has one that makes an embedding for each block: it is in none, and rounded to nearest."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.Gemma4TextConfig(
        vocab_size=99, vocab_size_per_layer_input=99, num_hidden_layers=2, head_dim=16, global_head_dim=16,
        hidden_size_per_layer_input=32, **sizes,
    )  # fmt: skip
    folder = tmp_path / "model"
    transformers.Gemma4ForCausalLM(config).save_pretrained(folder)
    said = "outside of the blocks that text is run through: rounded to nearest"
    calibrated = prepare(folder, decided(Recipe(parse("w8"), method=Method((), "gptq")), True), with_text=True)
    (note,) = (note for note in calibrated.notes if said in note)
    assert "per_layer_model_projection" in note and "layers." not in note
    for plain in [prepare(folder, decided(Recipe(parse("w8")), False))]:
        assert not any(said in note for note in plain.notes)


def test_codes_are_told_by_names_where_nobody_knows_the_class(llama_folder) -> None:
    folder = configured(changed(llama_folder(), stored_as(torch.int8)), model_type="nobody_knows")
    with pytest.raises(CheckpointError, match=r"is I8, and by its name it is a layer's weight"):
        job(folder)


def test_a_tensor_that_nobody_reads_is_told(llama_folder) -> None:
    folder = changed(llama_folder(), lambda ts: {**ts, "model.layers.0.mlp.up_proj.bias": torch.zeros(128)})
    assert "LlamaForCausalLM does not read model.layers.0.mlp.up_proj.bias: copied as it is" in job(folder).notes


@pytest.mark.parametrize("value", [None, {}])
def test_null_in_config_means_absent(llama_folder, value: object) -> None:
    folder = configured(llama_folder(), quantization_config=value, compression_config=value)
    assert schemes(job(folder)) and spicerack.load(folder) is not None and look(folder).estimates


@pytest.mark.parametrize(("key", "count", "known"), [
    ("vocab_size_per_layer_input", 262_144, True), ("shared_expert_intermediate_size", 20_480, True),
    ("num_experts", 10**9, True), ("num_hidden_layers", 20_000, False), ("num_decoder_layers", 10**9, False),
])  # fmt: skip
def test_numbers_of_modules_are_bounded_and_sizes_are_not(key: str, count: int, known: bool) -> None:
    """A size, and a key that the class does not read, make no modules; what makes too many of them under another name
    is given up while it is built (`test_census`)."""
    from spicerack.models.architecture import on_meta

    config = json.loads(transformers.LlamaConfig(**families.LLAMA, architectures=["LlamaForCausalLM"]).to_json_string())
    assert (on_meta(config | {key: count}) is not None) == known


# ---- rules and recipes -----------------------------------------------------------------------------------------------


def test_a_recipe_that_quantizes_nothing_is_refused_with_what_there_is(llama_folder, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="the rules leave every layer in float"):
        job(llama_folder(), "w8", "**=skip")
    resnet = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    transformers.ResNetForImageClassification(resnet).save_pretrained(tmp_path / "resnet")
    with pytest.raises(RecipeError, match=r"convolution \(convolutions of transformers models stay in float\)"):
        job(tmp_path / "resnet")
    wide = changed(llama_folder("wide"), lambda ts: {n: t.double() for n, t in ts.items()})
    with pytest.raises(RecipeError, match=r"F64 weights are not quantized(.|\n)*model\.float\(\)"):
        job(wide)


@pytest.mark.parametrize(
    ("name", "asked", "reason"),
    [
        ("dbrx", "**.experts.mlp.w1=w8", "the architecture's code needs its experts whole"),
        ("lara_mini", "**.linear_attn.in_proj=w8", "transformers changes it while loading, by Split"),
    ],
)
def test_a_rule_that_only_asks_for_what_cannot_be_had_is_refused_by_name(
    name: str, asked: str, reason: str, tmp_path: Path
) -> None:
    folder = built(name, tmp_path)
    assert any(reason in note and "% of the weights in matrices stay in float" in note for note in job(folder).notes)
    with pytest.raises(RecipeError, match=rf"^rule {asked.replace('*', '.')}: .*stays in float.*: {reason}"):
        job(folder, "w8", asked)


def built(name: str, folder: Path) -> Path:
    if name in families.FAMILIES:
        return family(name, folder / name)
    tiny.build(name).save_pretrained(folder / name)
    return folder / name


def test_types_are_a_veto_that_is_told_to_the_rule(llama_folder) -> None:
    folder = changed(llama_folder(), lambda ts: {n: t.double() if "mlp" in n else t for n, t in ts.items()})
    assert any("F64 weights are not quantized" in note for note in job(folder).notes)
    with pytest.raises(RecipeError, match=r"rule \*\*\.mlp\.\*\*=w4: .* stays in float \(and 5 more\): F64"):
        job(folder, "w8", "**.mlp.**=w4")
    partly = job(folder, "w8", "**.{up_proj,q_proj}=w4")  # some of it is had
    assert "model.layers.0.mlp.up_proj" not in schemes(partly)
    assert any("rule **.{up_proj,q_proj}=w4: 2 of 4 layers stay in float, such as" in note for note in partly.notes)


def test_two_tensors_that_differ_are_two(llama_folder, tmp_path: Path) -> None:
    folder = configured(llama_folder(), tie_word_embeddings=True)
    assert schemes(job(folder, "w8", "lm_head=w4g32"))["lm_head"] == "w4g32"
    assert "model.embed_tokens" not in schemes(job(folder, "w8", "lm_head=w4g32")) and not look(folder).tied
    spicerack.quantize(folder, "w8", output=tmp_path / "out", rules=["lm_head=w8"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    changed(folder, lambda ts: ts | {"lm_head.weight": ts["model.embed_tokens.weight"].clone()})
    assert "lm_head" not in schemes(job(folder, "w8", "lm_head=w4g32")) and look(folder).tied
    assert [a.fate for a in job(folder).actions if a.info.name == "lm_head.weight"] == ["drop"]


def test_one_word_may_tie_others(tmp_path: Path) -> None:
    """LUKE has two heads: one holds other numbers than its embedding, and of the other nothing is stored."""
    model = tiny.build("luke")
    model.save_pretrained(tmp_path / "m")
    spicerack.quantize(tmp_path / "m", "w8", output=tmp_path / "out")
    state, loaded = model.state_dict(), spicerack.load(tmp_path / "out").state_dict()
    assert all(torch.equal(state[name], loaded[name]) for name in state if "decoder" in name)
    with pytest.raises(RecipeError, match=r"lm_head\.decoder.* one word says both"):
        job(tmp_path / "m", "w8", "lm_head.decoder=w8")


def test_towers_stay_in_float_where_text_chooses_the_codes(tmp_path: Path) -> None:
    folder = family("llava", tmp_path / "m")
    rounded, calibrated = schemes(job(folder, "w8")), job(folder, "w8", with_text=True)
    towers = {name for name in rounded if "language_model" not in name}
    assert towers and rounded.keys() - towers == schemes(calibrated).keys()
    (note,) = [note for note in calibrated.notes if "no text reaches" in note]
    root = note.partition("--set '")[2].partition("=SCHEME")[0]
    asked = schemes(job(folder, "w8", f"{root}=w4", with_text=True))
    assert {name for name, scheme in asked.items() if scheme == "w4"} <= towers and "w4" in asked.values()
    with pytest.raises(RecipeError, match=r"rule \*\*\.fc1=w4: .*fc1 stays in float.*no text reaches it"):
        job(folder, "w8", "**.fc1=w4", with_text=True)
    for name in ("qwen3", "gpt2", "bert-mlm"):
        other = family(name, tmp_path / name)
        assert schemes(job(other, "w8", with_text=True)) == schemes(job(other, "w8"))


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "mixtral", "bert-mlm", "t5", "vit", "albert", "llava", "dbrx"])
def test_inspect_promises_what_quantize_does(name: str, tmp_path: Path) -> None:
    """Where names are enough they tell what transformers would; elsewhere it is asked."""
    folder = family(name, tmp_path / "m")
    made, report, kept = job(folder), look(folder), promised(Checkpoint.open(folder))
    assert kept == (frozenset(), None) or not report.by_names
    quantized = {a.info.name for a in made.actions if a.stored is not None}
    copied = {a.info.name for a in made.actions if a.role in ("linear", "conv1d", "experts")} - quantized
    assert copied == kept[0]


# ---- files -----------------------------------------------------------------------------------------------------------


def test_models_inside_a_model_are_left_out_and_told(llama_folder, tmp_path: Path) -> None:
    folder = llama_folder()
    shutil.copytree(folder, tmp_path / "other")
    shutil.move(tmp_path / "other", folder / "checkpoint-100")
    (folder / "runs").mkdir()
    (folder / "runs" / "events.out.tfevents.1.host").write_text("curves")
    (folder / "trainer_state.json").write_text('{"best_model_checkpoint": "/home/somebody"}')
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    spicerack.quantize(folder, "w8", output=folder / "w8")
    spicerack.quantize(folder, "w4g32", output=folder / "w4")
    written = {p.relative_to(folder / "w4").as_posix() for p in (folder / "w4").rglob("*") if p.is_file()}
    assert "1_Pooling/config.json" in written
    assert not [name for name in written if name.startswith(("checkpoint", "w8", "runs", "trainer"))]
    assert {"checkpoint-100/ is not part of the model and is left out"} <= set(Checkpoint.open(folder).notes)


def test_an_adapter_beside_a_model_is_refused(llama_folder) -> None:
    folder = llama_folder()
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json lies beside the model.*merge_and_unload"):
        job(folder)


def test_home_is_found_wherever_a_path_is_taken(llama_folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    spicerack.quantize(llama_folder(), "w8", output="~/a")
    spicerack.save(spicerack.load("~/a"), "~/b")
    assert {path.name for path in home.iterdir()} == {"a", "b"} and not Path("~").exists()


# ---- save ------------------------------------------------------------------------------------------------------------


def llama(**more: object) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**families.LLAMA | more)).eval()


def test_save_stores_a_layer_that_stands_twice_twice(tmp_path: Path) -> None:
    model = llama(num_hidden_layers=3)
    first, middle, last = model.model.layers
    model.model.layers = nn.ModuleList([first, middle, middle, last])
    model.config.num_hidden_layers, model.config.layer_types = 4, None
    small = spicerack.quantize(model, "w8")
    ids = torch.tensor([[3, 5, 7]])
    with torch.no_grad():
        loaded = spicerack.load(spicerack.save(small, tmp_path / "out"))
        assert torch.allclose(small(ids, use_cache=False).logits, loaded(ids, use_cache=False).logits, atol=1e-5)


@pytest.mark.parametrize(("edit", "message"), [
    (add_bias, "down_proj.bias has no place"),
    (lambda m: m.model.layers.__delitem__(1), r"layers\.1\..* is not in the model"),
    (lambda m: setattr(m, "extra", nn.Linear(4, 4)), r"extra\.weight.*has no place in LlamaForCausalLM"),
    (lambda m: setattr(m.model.norm, "weight", nn.Parameter(torch.ones(16))), "norm.weight has another shape"),
])  # fmt: skip
def test_save_refuses_what_its_config_does_not_describe(
    edit: Callable[[nn.Module], None], message: str, tmp_path: Path
) -> None:
    small = spicerack.quantize(llama(), "w8")
    edit(small)
    with pytest.raises(UsageError, match=message):
        spicerack.save(small, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_no_path_of_this_machine_gets_into_what_is_written(llama_folder, tmp_path: Path) -> None:
    spicerack.save(spicerack.quantize(spicerack.load(llama_folder()), "w8"), tmp_path / "out")
    texts = [path.read_text() for path in (tmp_path / "out").iterdir() if path.suffix == ".json"]
    assert texts and not [text for text in texts if str(tmp_path) in text]


def test_a_config_that_makes_no_model_is_not_an_unknown_family(llama_folder) -> None:
    with pytest.raises(CheckpointError, match="negative dimension"):
        job(configured(llama_folder(), hidden_size=-64))


@pytest.mark.parametrize("name", ["albert", "distilbert", "modernbert"])
def test_heads_of_a_model_for_text_are_no_towers(name: str, tmp_path: Path) -> None:
    """Whatever lies outside of the part that has the embedding: text reaches it."""
    tiny.build(name).save_pretrained(tmp_path / "model")
    plain, calibrated = (schemes(job(tmp_path / "model", with_text=text)) for text in (False, True))
    assert calibrated == plain


def test_numbers_that_are_not_finite_are_told_where_they_are_copied(llama_folder, tmp_path: Path) -> None:
    broken = torch.full((64,), 3e38)  # whose sum is more than float32 holds
    broken[5] = torch.nan
    sound = torch.full((64,), 3e38)
    norms = {"model.norm.weight": broken, "model.layers.0.input_layernorm.weight": sound}
    spicerack.quantize(changed(llama_folder(), lambda ts: ts | norms), "w8", output=tmp_path / "out")
    written = ledger.read(tmp_path / "out")
    assert written is not None
    assert [entry.tensor for entry in written.entries if ledger.NOT_FINITE in entry.events] == ["model.norm.weight"]
