"""Plans that are seldom asked for: one token, thousands of users, too little memory, cards that do not divide."""

from __future__ import annotations

import dataclasses
import importlib
import json
import random
import shlex
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_model import CONFIGS, FACTS, NAMES, config
from transformers import (
    AlbertConfig,
    AlbertModel,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import spicerack
from spicerack.cli import _output, cli
from spicerack.cli._fit import Fitted
from spicerack.errors import UsageError
from spicerack.machine import catalogue
from spicerack.machine.catalogue import GIB
from spicerack.planning import engine as engines
from spicerack.planning.engine import Request
from spicerack.planning.model import Model, of_config, open_model
from spicerack.planning.placement import Host
from spicerack.planning.plan import Goal, plan, written_for
from spicerack.planning.precisions import ours, weighed
from spicerack.planning.speed import kind_of
from spicerack.planning.written import open_any, reader

MODELS: dict[str, Model] = {}


def model(name: str) -> Model:
    known = {key: value for key, value in config(name).items() if key != FACTS}
    return MODELS.setdefault(name, of_config(known, name))


@pytest.fixture(autouse=True)
def _nobody_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))


def goals(own: Model, some: random.Random) -> Goal:
    """Anything that can be typed."""
    every = catalogue.built_in()
    devices = [some.choice(every) for _ in range(some.choice((1, 1, 2, 3)))]
    if some.random() < 0.5:
        devices = [some.choice([device for device in every if device.kind == "gpu"])] * some.choice((1, 2, 3, 4, 8))
    most = own.positions or 8192
    request = Request(
        min(some.choice((1, 2, 255, 257, 4096, most)), most),
        some.choice((1, 7, 64, 256, 4096)),
        some.choice((16, 8, 4)),
    )
    host = Host(some.choice((0, 1, 16 * GIB, 512 * GIB)), some.random() < 0.3)
    return Goal(tuple(devices), some.choice(engines.all_engines()), request, host)


@pytest.mark.parametrize("name", NAMES)
def test_anything_that_can_be_typed_is_a_plan_or_a_refusal(name: str) -> None:
    own, some = model(name), random.Random(name)
    for _ in range(12):
        goal = goals(own, some)
        try:
            made = plan(own, goal)
        except UsageError as refused:
            assert refused.hint
            continue
        for row in made.rows:
            held = [*row.placement.shares, *([row.placement.host] if row.placement.host else [])]
            assert all(term.nbytes >= 0 for share in held for term in share.terms), goal
            assert row.speed is None or (row.speed.basis and goal.engine.speed_of), goal
            assert 1 < row.bits < 40
        if made.recommended is not None and made.longest is not None:
            assert made.longest >= goal.request.context or made.longest == own.positions, goal
        assert all(remedy.row.placement.fits for remedy in made.remedies), goal
        assert bool(made.flags) == bool(made.recommended or made.remedies)


def test_a_cache_is_not_read_from_the_disk() -> None:
    """Weights may lie there; of a cache that memory has no room for is said that it is missing."""
    host = Host(0, True)
    rows = plan(
        model("Llama-3.1-70B"), Goal(catalogue.find("4080"), engines.get("llama.cpp"), Request(131072, 7), host)
    ).rows
    for row in rows:
        assert row.placement.host is not None
        weights, cache = row.placement.host.terms
        assert weights.nbytes == 0 and row.placement.disk <= row.weights.file
        assert row.placement.missing == cache.nbytes > 0 and not row.placement.fits


def test_what_is_asked_for_fits_with_what_is_asked_for() -> None:
    made = plan(model("Qwen3-8B"), Goal(catalogue.find("4060 Ti 16GB"), engines.get("llama.cpp"), Request(2, 256)))
    assert made.recommended is not None and made.longest is not None and made.longest >= 2


def test_slots_of_llama_server_are_256_at_most() -> None:
    """LLAMA_MAX_SEQ: more are refused when it starts, whatever the memory."""
    goal = Goal(catalogue.find("H200 SXM"), engines.get("llama.cpp"), Request(16, 257))
    with pytest.raises(UsageError, match="256 sequences"):
        plan(model("SmolLM2-135M"), goal)
    changed = Goal(catalogue.find("4060"), engines.get("vllm"), Request(8192, 300))
    assert not any("llama.cpp" in remedy.change for remedy in plan(model("Qwen3-8B"), changed).remedies)


def test_all_layers_in_ram_is_said_to_the_engine() -> None:
    goal = Goal(catalogue.find("GTX 1070"), engines.get("llama.cpp"), Request(8192, 256), Host(2048 * GIB))
    made = plan(model("Llama-3.1-70B"), goal, scheme="Q4_0")
    assert made.recommended is not None and not made.recommended.placement.shares
    assert "-ngl 0" in made.flags[0]
    assert made.recommended.speed is not None and "assumed" in made.recommended.speed.basis


@pytest.mark.parametrize(
    ("scheme", "cards", "parts"),
    [("w4g128", 2, 2), ("w4g128", 4, 2), ("w4g32", 4, 4), ("w4g32", 8, 4), ("bf16", 8, 8)],
)
def test_cards_get_whole_groups(scheme: str, cards: int, parts: int) -> None:
    """Experts of 768 channels: 384 on each of two cards are three groups of 128, 192 on each of four are none; of 96 on
    eight cards Marlin, which takes 64 at a time, computes no part."""
    goal = Goal(catalogue.find("H200 SXM") * cards, engines.get("vllm"), Request(4096))
    made = plan(model("Qwen3-30B-A3B"), goal, scheme=scheme)
    assert made.recommended is not None and made.recommended.placement.tensor == parts


def test_bits_of_a_model_whose_layers_have_no_numbers(tmp_path: Path) -> None:
    """ALBERT has one layer, which runs twelve times."""
    sizes = {"embedding_size": 32, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
    AlbertModel(AlbertConfig(vocab_size=99, **sizes)).save_pretrained(tmp_path)
    goal = Goal(catalogue.find("Laptop, LPDDR5-6400"), engines.get("spicerack"), Request(64))
    rows = {row.precision.name: row for row in plan(open_model(tmp_path), goal).rows}
    assert rows["as stored"].bits == 32 and 8 < rows["w8"].bits < 32 and rows["w8"].loss < 0.01


@pytest.mark.parametrize("family", ["aria_text", "ernie4_5_moe"])
def test_experts_are_counted_by_whatever_name_their_number_has(family: str, tmp_path: Path) -> None:
    made = tiny.build(family)
    made.save_pretrained(tmp_path)
    own = open_model(tmp_path)
    routed = sum(p.numel() for name, p in made.named_parameters() if "experts." in name and "shared" not in name)
    tables = 0 if own.tied else made.get_input_embeddings().weight.numel()
    total = sum(parameter.numel() for parameter in made.parameters())
    assert (own.experts, own.chosen, own.parameters) == (4, 2, total)
    assert own.read == total - tables - routed // 2


@pytest.mark.parametrize("fit", ["0.0000000001GB", "0.001GB"])
@pytest.mark.parametrize("engine", ["llama.cpp", "vllm", "transformers"])
def test_next_to_no_memory_is_too_little(fit: str, engine: str) -> None:
    made = plan(model("Llama-3.1-8B"), Goal(catalogue.find(fit) * 2, engines.get(engine), Request(64)))
    assert made.recommended is None and all(row.placement.missing > 10**9 for row in made.rows)


def test_an_architecture_is_what_somebody_wrote() -> None:
    device = dataclasses.replace(catalogue.find("3090")[0], arch="sm\N{SUPERSCRIPT TWO}")
    assert kind_of(device) == "memory"


def test_an_empty_scheme_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", str(CONFIGS / "Llama-3.1-8B.json"), "--fit", "3090", "--scheme", "", "--json"]
    assert _output.run(cli, words) == 2
    assert "does not run ''" in json.loads(capsys.readouterr().out)["message"]


@pytest.mark.parametrize("same", [True, False])
def test_tables_that_are_called_tied_and_differ_are_two(same: bool, tmp_path: Path) -> None:
    """Of the folder that quantize writes as of the model, by the bytes in the files: where both tables are the same one
    is written."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=99, tie_word_embeddings=True, **sizes)).save_pretrained(tmp_path / "in")
    path = tmp_path / "in" / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + (0 if same else 1)
    save_file(tensors, path, {"format": "pt"})
    spicerack.quantize(tmp_path / "in", "w8", output=tmp_path / "out")
    written = sum(t.numel() * t.element_size() for t in load_file(tmp_path / "out" / "model.safetensors").values())
    own, precision = open_any(tmp_path / "out")
    assert precision is not None and own.tied == same
    assert weighed(own, precision).file == written == weighed(open_model(tmp_path / "in"), ours("w8")).file


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("engine", "numbers", "scheme"),
    [("llama.cpp", "Q8_0", "w8g32"), ("llama.cpp", "Q4_0", "w4g32"), ("vllm", "w8", "w8"), ("spicerack", "w8", "w8")],
)
def test_what_is_made_for_an_engine_weighs_what_was_planned_and_the_engine_reads_it(
    llama_folder: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    engine: str,
    numbers: str,
    scheme: str,
    tied: bool,
) -> None:
    """To the byte, tables and heads too, in the file that the engine reads; and that file is planned alike."""
    source = llama_folder(hidden_size=256, intermediate_size=768, tie_word_embeddings=tied, dtype=torch.bfloat16)
    device = "Laptop, LPDDR5-6400" if engine == "spicerack" else "3090"
    goal = Goal(catalogue.find(device), engines.get(engine), Request(64))
    row = plan(open_model(source), goal, scheme=numbers).rows[0]
    own = tmp_path / "own.json"
    tight = dataclasses.replace(goal.devices[0], name="Tight", usable_gib=(row.placement.total + 1000) / GIB)
    own.write_text(json.dumps(dataclasses.asdict(tight)))
    catalogue.add(own)
    words = ["quantize", source, "-o", tmp_path / "out", "--fit", "tight", "--context", 64, "--engine", engine]
    assert _output.run(cli, [str(word) for word in [*words, "--no-check", "--json"]]) == 0, capsys.readouterr().out
    assert json.loads(capsys.readouterr().out)["scheme"] == scheme
    made, written = tmp_path / "out", 0
    if engine == "llama.cpp":
        gguf = pytest.importorskip("gguf")
        made = tmp_path / "made.gguf"
        spicerack.export(tmp_path / "out", to="gguf", output=made, for_="llama.cpp")
        written = sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(made).tensors)
    else:
        written = sum(t.numel() * t.element_size() for t in load_file(made / "model.safetensors").values())
    opened, precision = open_any(made)
    assert precision is not None
    again = plan(opened, dataclasses.replace(goal, engine=reader(opened, precision, engine))).rows[0]
    assert row.weights.file == written == again.weights.file
    assert again.placement.total == row.placement.total and again.weights.read == row.weights.read
    assert (again.speed is None) == (row.speed is None)


def test_what_an_engine_does_not_read_is_not_made_for_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """GPT-2's layers are no Linear ones, which is all that vLLM has in few bits: said before anything is written."""
    GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=128, n_layer=1, n_head=2)).save_pretrained(tmp_path / "in")
    words = [
        "quantize",
        str(tmp_path / "in"),
        "-o",
        str(tmp_path / "out"),
        "--context",
        "64",
        "--json",
        "--fit",
        "3090",
    ]
    assert _output.run(cli, [*words, "--engine", "vllm"]) == 2
    assert "for vllm" in json.loads(capsys.readouterr().out)["message"] and not (tmp_path / "out").exists()
    own = open_model(tmp_path / "in")
    assert "onnxruntime" not in {engine.name for engine in written_for(own)}


def test_what_stays_in_float_must_fit_too() -> None:
    fitted = Fitted("w8", (), "vllm", "because", "a thimble", nbytes=1000, spare=50)
    fitted.check(1050)
    with pytest.raises(UsageError, match="51 bytes more than planned, and a thimble had 50"):
        fitted.check(1051)


def test_lines_for_mlx_are_what_its_parsers_take() -> None:
    """And say the cache that was planned: mlx-lm keeps 16 bits until it is told, and 5,000 tokens longer."""
    generating = pytest.importorskip("mlx_lm") and importlib.import_module("mlx_lm.generate")
    converting = importlib.import_module("mlx_lm.convert")
    for bits in (16, 8, 4):
        goal = Goal(catalogue.find("M4"), engines.get("mlx"), Request(4096, cache_bits=bits))
        for scheme in ("bf16", "4bit"):
            lines = plan(model("Llama-3.2-1B"), goal, scheme=scheme).flags
            asked = generating.setup_arg_parser().parse_args(shlex.split(lines[-1])[1:])
            assert (asked.kv_bits, asked.model) == (
                None if bits == 16 else bits,
                "MODEL" if scheme == "bf16" else "OUT",
            )
            assert bits == 16 or (asked.quantized_kv_start == 0 and asked.kv_group_size == 64)
            if scheme == "4bit":
                made = converting.configure_parser().parse_args(shlex.split(lines[0])[1:])
                assert (made.quantize, made.q_bits, made.q_group_size) == (True, 4, 64)


def test_the_call_for_transformers_loads_what_was_planned(tmp_path: Path) -> None:
    """Run on a small folder in 16 bits; in 4 bits, whose library computes on cards alone, its options are looked at."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=99, **sizes)).save_pretrained(tmp_path)
    own, known = open_model(tmp_path), {"MODEL": str(tmp_path), "torch": torch, **vars(transformers)}
    goal = Goal(catalogue.find("Laptop, LPDDR5-6400"), engines.get("transformers"), Request(64))
    (call,) = plan(own, goal, scheme="bf16").flags
    pytest.importorskip("accelerate")
    loaded = eval(call, {**known, "AutoModelForCausalLM": transformers.AutoModelForCausalLM})
    row = plan(own, goal, scheme="bf16").rows[0]
    assert sum(p.nbytes for p in loaded.parameters()) == row.weights.file
    (call,) = plan(own, goal, scheme="bnb nf4").flags
    given = eval(call[call.index("BitsAndBytesConfig") : -1], {**known, "BitsAndBytesConfig": BitsAndBytesConfig})
    # 4 bits, 8 of 64 and 32 of 256 times as many: 4.127, which is planned with
    assert given.bnb_4bit_use_double_quant and given.bnb_4bit_quant_type == "nf4"
    assert given.bnb_4bit_compute_dtype == torch.bfloat16
