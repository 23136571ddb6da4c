"""Plans: the arithmetic of one, the invariants of a thousand, and what is refused."""

from __future__ import annotations

import dataclasses
import itertools
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from test_model import CONFIGS, FACTS, NAMES, config

from spicerack.cli import _output, cli
from spicerack.errors import UsageError
from spicerack.machine import catalogue
from spicerack.machine.catalogue import GIB, Device
from spicerack.planning import engine as engines
from spicerack.planning import plan as planning
from spicerack.planning import speed
from spicerack.planning.engine import Request
from spicerack.planning.model import Model, of_config, open_model
from spicerack.planning.placement import Host, place
from spicerack.planning.plan import Goal, Plan, row_of
from spicerack.planning.precisions import mixture
from spicerack.planning.speed import kind_of


@cache
def model(name: str) -> Model:
    return of_config({key: value for key, value in config(name).items() if key != FACTS}, name)


def goal(fit: str, engine: str, context: int = 8192, **more: Any) -> Goal:
    host = more.pop("host", Host())
    return Goal(catalogue.find(fit), engines.get(engine), Request(context, **more), host)


def planned(name: str, fit: str, engine: str, context: int = 8192, **more: Any) -> Plan:
    scheme = more.pop("scheme", None)
    return planning.plan(model(name), goal(fit, engine, context, **more), scheme=scheme)


# ---- 70 B in 40 GB on two 3090s -------------------------------------------------------------------------------------

LAYERS, HIDDEN, VOCABULARY, KV, HEAD = 80, 8192, 128_256, 8, 128


def test_70b_on_two_3090s_with_llama_cpp() -> None:
    """It fits, with 3.8 GiB to spare: the arithmetic that the project's sentence stands on."""
    plan = planned("Llama-3.1-70B", "2x3090", "llama.cpp")
    row = plan.recommended
    assert row is not None and row.precision.name == "Q4_K_M"
    cards = row.placement
    file = 42_520_398_400 - 7_866_944  # the published file less its header
    table = VOCABULARY * HIDDEN * 144 // 256  # Q4_K, in RAM
    cache_bytes = 2 * LAYERS * KV * HEAD * 2 * 8192  # keys and values, 2 bytes
    assert cache_bytes == 2.5 * GIB
    # masks of 8,192 tokens, six rows of hidden channels, three of the MLP, for a batch of 512
    buffer = 2 * 512 * 8192 + 6 * 4 * 512 * HIDDEN + 3 * 4 * 512 * 28672
    assert row.weights.file == file
    assert cards.total == file - table + cache_bytes + 2 * buffer
    available = 2 * int(22.95 * GIB)  # of 24 GiB, less what the driver and CUDA's context take
    assert cards.budget == available
    assert cards.spare / GIB == pytest.approx(3.8, abs=0.1)
    assert cards.host is not None and cards.host.total == table
    assert [len(share.layers) for share in cards.shares] == [41, 39]  # the second has the head, too
    assert "-ts 41,40" in plan.flags[0] and "-ngl 99" in plan.flags[0]  # where llama.cpp counts the head as a layer
    assert row.speed is not None
    assert row.speed.decode == pytest.approx(16.57, rel=0.2)  # measured: XiongjieDai/GPU-Benchmarks-on-LLM-Inference
    # two cards one after the other: what one would need for all of it
    read = file - table
    assert 1 / row.speed.decode == pytest.approx(read / (0.89 * 936e9) + LAYERS * 48e-6)


def test_70b_on_two_3090s_with_vllm_and_what_makes_it_fit() -> None:
    """At its defaults it does not: the same bits, the same cards. A cache of 8 bits is the smallest change."""
    plan = planned("Llama-3.1-70B", "2x3090", "vllm", scheme="w4g128z")
    (row,) = plan.rows
    linear = LAYERS * (2 * HIDDEN * HIDDEN + 2 * KV * HEAD * HIDDEN + 3 * 28672 * HIDDEN)
    weights = linear * (4 + 20 / 128) / 8 + 2 * VOCABULARY * HIDDEN * 2  # codes, scale and zero of 128; two tables
    assert row.weights.total == pytest.approx(weights, rel=2e-4)  # norms, and a shape of 16 bytes for each layer
    profiled = 2 * (1.0 + 0.9 + 0.5) * GIB
    assert row.placement.total == pytest.approx(weights + 2.5 * GIB + profiled, rel=2e-4)
    assert row.placement.budget == pytest.approx(2 * 0.92 * 23.57 * GIB, rel=1e-3)
    assert not row.placement.fits and row.placement.tensor == 2
    assert row.placement.spare / GIB == pytest.approx(-0.97, abs=0.02)
    changes = [remedy.change for remedy in plan.remedies]
    assert changes[0] == "a cache of 8 bits" and changes[1] == "a context of 4,864 tokens"
    assert "--gpu-memory-utilization 0.95" in changes and "--engine llama.cpp (Q4_K_M)" in changes
    for remedy in plan.remedies:  # each is a plan of its own, in which it fits
        assert remedy.row.placement.fits
        assert row_of(plan.model, remedy.row.precision, remedy.goal).placement == remedy.row.placement
    assert "--kv-cache-dtype fp8" in plan.flags[0] and "--tensor-parallel-size 2" in plan.flags[0]
    longer = planned("Llama-3.1-70B", "2x3090", "vllm", 4864, scheme="w4g128z")
    assert longer.recommended is not None and longer.longest == 4864


# ---- a thousand plans -----------------------------------------------------------------------------------------------

SPREAD = [device for i, device in enumerate(catalogue.built_in()) if i % 5 in (0, 3)]


def engine_of(own: Model, device: Device) -> engines.Engine | None:
    kinds = [kind_of(device)]
    able = [engine for engine in engines.all_engines() if engine.obstacle(own, [device], kinds) is None]
    return able[(len(own.name) + len(device.name)) % len(able)] if able else None


@pytest.mark.parametrize("name", NAMES)
def test_no_plan_is_absurd(name: str) -> None:
    """Forty devices for each of 26 models, with an engine that can: nothing negative, nothing for nothing."""
    own = model(name)
    context = planning.context_of(own, None)
    count = 0
    for device in SPREAD:
        engine = engine_of(own, device)
        if engine is None:
            assert device.kind == "watch" or kind_of(device) in ("memory", "vulkan", "metal", "phone")
            continue
        at = Goal((device,), engine, Request(context))
        rows = [row_of(own, precision, at) for precision in engine.precisions(own)]
        check_rows(own, rows)
        count += 1
        smallest = min(rows, key=lambda row: row.weights.total)
        more = [
            dataclasses.replace(at, request=Request(2 * context)),
            dataclasses.replace(at, request=Request(context, users=3)),
        ]
        for other in more:  # more is never less
            row = row_of(own, smallest.precision, other)
            assert row.placement.total + row.placement.missing >= smallest.placement.total
            assert smallest.placement.fits or not row.placement.fits
        larger = dataclasses.replace(device, memory_gib=2 * device.memory_gib, usable_gib=2 * device.usable_gib)
        for row in rows:  # more memory never refuses
            roomier = row_of(own, row.precision, dataclasses.replace(at, devices=(larger,)))
            assert roomier.placement.fits or not row.placement.fits
    assert count >= 30


def check_rows(own: Model, rows: list[planning.Row]) -> None:
    """Of one model on one device."""
    for row in rows:
        shares = row.placement.shares
        assert all(term.nbytes >= 0 for share in shares for term in share.terms)
        assert row.weights.read <= row.weights.file
        assert 0.5 * row.precision.bits <= row.bits <= 2.2 * row.precision.bits + 1 or own.family in ("gpt_oss", "t5")
        assert row.placement.fits == (row.placement.spare >= 0)
        held = sorted(layer for share in shares for layer in share.layers)
        assert held == list(range(len(own.layers)))
        if row.speed is not None:
            assert 0.01 < row.speed.full <= row.speed.decode < 20_000
            assert row.speed.prompt is None or 0 < row.speed.prompt[0] < row.speed.prompt[1]
    for a, b in itertools.combinations(rows, 2):  # more bytes are never faster
        less, more = sorted((a, b), key=lambda row: row.weights.read)
        if less.speed and more.speed:
            assert more.speed.decode <= less.speed.decode * (1 + 1e-9)
    ours = [row for row in rows if row.precision.scheme and not row.precision.name.startswith("Q")]
    for a, b in itertools.pairwise(sorted(ours, key=lambda row: -row.bits)):  # more bits are never smaller, or worse
        assert a.weights.file >= b.weights.file and a.loss <= b.loss


@pytest.mark.parametrize("engine", ["llama.cpp", "vllm"])
@pytest.mark.parametrize("name", ["Llama-3.1-70B", "Qwen3-30B-A3B", "DeepSeek-V3", "Gemma-3-27b", "Phi-4"])
def test_another_card_never_turns_fits_into_does_not(name: str, engine: str) -> None:
    own = model(name)
    for first, second in (("3090", "3090"), ("4090", "3060"), ("H200 SXM", "4060"), ("3060", "RTX 6000 Ada")):
        fitted: dict[str, bool] = {}
        for count in range(1, 9):
            devices = catalogue.find(first) + catalogue.find(second) * (count - 1)
            at = Goal(devices, engines.get(engine), Request(4096))
            for precision in at.engine.precisions(own):
                placement = place(own, precision, at.engine, at.request, at.devices, at.host)
                assert placement.fits or not fitted.get(precision.name), f"{precision.name} on {count}"
                fitted[precision.name] = placement.fits
                assert all(share.total <= share.budget for share in placement.shares) or not placement.fits


def test_the_longest_context_is_the_longest() -> None:
    for name, fit in (("Llama-3.1-70B", "2x3090"), ("Gemma-3-27b", "3090"), ("Qwen3-8B", "3060")):
        plan = planned(name, fit, "llama.cpp", 4096)
        assert plan.recommended is not None and plan.longest is not None
        precision, at = plan.recommended.precision, plan.goal
        assert row_of(plan.model, precision, planning._with(at, context=plan.longest)).placement.fits
        assert (
            plan.longest == plan.model.positions
            or not row_of(plan.model, precision, planning._with(at, context=plan.longest + 256)).placement.fits
        )


# ---- places beside the cards ----------------------------------------------------------------------------------------


def test_experts_go_to_ram_before_layers_do() -> None:
    """As few as it takes, of the first layers, and the flag that says so."""
    plan = planned("Qwen3-30B-A3B", "3060", "llama.cpp", scheme="Q4_K_M", host=Host(ram=32 * GIB))
    row = plan.recommended
    assert row is not None and row.placement.host is not None
    moved = row.placement.experts_in_ram
    assert 0 < moved < 48 and f"--n-cpu-moe {moved}" in plan.flags[0] and "-ngl 99" in plan.flags[0]
    (card,) = row.placement.shares
    assert card.spare >= 0 and len(card.layers) == 48
    per_layer = row.weights.blocks[0].routed
    assert card.spare < max(block.routed for block in row.weights.blocks)  # one layer fewer would not fit
    assert row.placement.host.total > moved * per_layer * 0.9
    alone = planned("Qwen3-30B-A3B", "3060", "llama.cpp", scheme="Q2_K").recommended
    assert alone is not None and alone.speed is not None and row.speed is not None
    assert row.speed.decode < alone.speed.decode


def test_layers_go_to_ram_from_the_first_on() -> None:
    plan = planned("Llama-3.1-70B", "3090", "llama.cpp", scheme="Q4_K_M", host=Host(ram=64 * GIB))
    row = plan.recommended
    assert row is not None and row.placement.host is not None
    (card,), host = row.placement.shares, row.placement.host
    assert (*host.layers, *card.layers) == tuple(range(80)) and host.layers[0] == 0
    assert plan.flags[0].endswith(f"-ngl {len(card.layers) + 1}")  # the head is the last of those on the card
    assert row.speed is not None and row.speed.decode < 5


def test_what_fits_nowhere_is_on_the_disk_if_that_is_allowed() -> None:
    without = planned("Llama-3.1-70B", "3060", "llama.cpp", scheme="Q4_K_M", host=Host(ram=16 * GIB))
    assert without.recommended is None and without.rows[0].placement.missing > 0
    on_disk = planned("Llama-3.1-70B", "3060", "llama.cpp", scheme="Q4_K_M", host=Host(ram=16 * GIB, disk=True))
    (row,) = on_disk.rows
    assert row.placement.disk == without.rows[0].placement.missing and not row.placement.missing
    assert row.speed is None and "disk" in (row.speechless or "")


def test_devices_that_share_memory_count_a_table_once() -> None:
    """Of a tied table llama.cpp has one copy on the card and one in RAM; on one pool of memory there is the one."""
    card = planned("Llama-3.2-1B", "3060", "llama.cpp", scheme="Q8_0").rows[0]
    chip = planned("Llama-3.2-1B", "Apple M4 Pro", "llama.cpp", scheme="Q8_0").rows[0]
    assert card.placement.host is not None and card.placement.host.total == card.weights.input
    assert chip.placement.host is None and chip.placement.total == card.placement.total


def test_users_share_weights_and_not_caches() -> None:
    one, four = (
        planned("Llama-3.1-8B", "4090", "vllm", 4096, users=users, scheme="w4g128").rows[0] for users in (1, 4)
    )
    assert one.speed is not None and four.speed is not None
    assert four.speed.decode == one.speed.decode  # for each of them
    assert four.placement.total - one.placement.total == 3 * 32 * 2 * 8 * 128 * 2 * 4096
    mixture = [planned("Qwen3-30B-A3B", "H200 SXM", "vllm", users=n, scheme="w4g128").rows[0].speed for n in (1, 8)]
    assert mixture[0] is not None and mixture[1] is not None
    assert mixture[1].decode < mixture[0].decode < 8 * mixture[1].decode


# ---- speed ----------------------------------------------------------------------------------------------------------


def test_speeds_of_a_device_without_a_bandwidth_are_not_said() -> None:
    plan = planned("Llama-3.2-1B", "24GB", "llama.cpp")
    assert plan.recommended is not None and plan.recommended.speed is None
    assert "bandwidth" in (plan.recommended.speechless or "")


def test_measured_decode_speeds_are_met() -> None:
    """Through the whole planner, from config.json: the median of these is within 7 %, and each within 30 %."""
    measured = [
        ("Llama-3.1-8B", "RTX 5070", "Q4_K_M", 105.3), ("Qwen3-8B", "RTX 5070", "Q4_K_M", 103.0),
        ("Phi-4", "RTX 5070", "Q4_K_M", 58.4), ("Llama-3.2-1B", "RTX 5070", "Q4_K_M", 466.0),
        ("Qwen3-30B-A3B", "RTX PRO 6000", "Q4_K_M", 251.0), ("gpt-oss-20b", "DGX Spark", "MXFP4", 83.4),
        ("gpt-oss-120b", "DGX Spark", "MXFP4", 58.7), ("Phi-4", "RX 7900 XT", "Q4_K_M", 66.0),
        ("Gemma-3-27b", "Apple M4 Pro", "Q4_K_M", 13.2), ("Llama-3.1-8B", "Apple M4 Pro", "Q4_K_M", 47.2),
        ("Mistral-Small-24B-2501", "RX 7900 XT", "Q4_K_M", 43.7), ("Qwen3-30B-A3B", "DGX Spark", "Q8_0", 61.1),
    ]  # fmt: skip
    errors = []
    for name, fit, numbers, rate in measured:
        said = planned(name, fit, "llama.cpp", scheme=numbers).rows[0].speed
        assert said is not None
        errors.append(abs(said.decode / rate - 1))
    assert sorted(errors)[len(errors) // 2] <= 0.07 and max(errors) <= 0.3, errors


def test_kinds_of_devices_are_all_known() -> None:
    kinds = {kind_of(device) for device in catalogue.built_in()}
    assert kinds <= {"cuda", "cuda-old", "rocm-rdna", "rocm-cdna", "vulkan", "metal", "cpu", "phone", "watch"}
    assert {kind for _, kind in speed.CONSTANTS} - {"metal-2023"} <= kinds


# ---- refusals, and what people see ----------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _nobody_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))


def run(*args: str | Path) -> int:
    return _output.run(cli, list(map(str, args)))


LLAMA = CONFIGS / "Llama-3.1-8B.json"


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["--fit", "RTX 9999"], "no device 'RTX 9999'", "RTX 5090"),
        (["--fit", "h100"], "several devices: H100 PCIe, H100 SXM", "more of the name"),
        (["--fit", "3090", "--context", "200000"], "beyond the model's 131,072", "--context 131072"),
        (["--fit", "3090", "--engine", "mlx"], "does not compute on RTX 3090", "llama.cpp"),
        (["--fit", "3090", "--engine", "tgi"], "no engine 'tgi'", "vllm"),
        (["--fit", "3090", "--engine", "vllm", "--cache", "4"], "no cache of 4 bits", "--cache 16 or 8"),
        (["--fit", "3090", "--scheme", "w4g128"], "llama.cpp does not run 'w4g128'", "Q4_K_M"),
        (["--fit", "3090", "--users", "0"], "--users", "--help"),
    ],
)
def test_what_is_refused(words: list[str], message: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", LLAMA, *words, "--json") == 2
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert message in told["message"] and hint in told["hint"], told
    assert "Traceback" not in err


def test_an_engine_that_cannot_run_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", CONFIGS / "Whisper-large-v3.json", "--fit", "3090", "--engine", "llama.cpp") == 2
    assert "whisper.cpp" in (err := capsys.readouterr().err) and "--engine" in err and "vllm" in err


def test_a_config_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = tmp_path / "config.json"
    for text, said in (("{", "config.json"), ("{}", "family"), ('{"model_type": "llama"}', "vocab_size")):
        bare.write_text(text)
        assert run("plan", bare, "--fit", "3090") == 2
        assert said in capsys.readouterr().err
    assert run("plan", tmp_path / "nothing.json", "--fit", "3090") == 2


@pytest.mark.parametrize("name", NAMES)
def test_what_people_see_fits_80_columns(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run("plan", CONFIGS / f"{name}.json", "--fit", "RTX 3060", "--engine", "transformers") == 0
    out = capsys.readouterr().out
    table = out[out.index("numbers") : out.index("\n\n", out.index("numbers"))].splitlines()
    assert all(len(line) <= 80 and "\N{HORIZONTAL ELLIPSIS}" not in line for line in table)
    assert "Recommended" in out or "Nothing fits" in out


def test_json_says_what_the_table_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", LLAMA, "--fit", "3060", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["recommended"] == "Q8_0" and told["engine"] == "llama.cpp" and told["read_per_token"] == 7_504_924_672
    row = next(row for row in told["rows"] if row["numbers"] == "Q8_0")
    held = sum(term["bytes"] for share in row["devices"] for term in share["terms"])
    assert held == row["memory_bytes"] == row["budget_bytes"] - row["spare_bytes"]
    assert "within 20 %" in row["speed_basis"]


def test_this_machine_is_planned_for_when_nobody_says_another(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", CONFIGS / "SmolLM2-135M.json", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["recommended"] and told["rows"][0]["tokens_per_s"] > 0
    with pytest.raises(UsageError):
        engines.get("nothing")


def test_quantize_does_what_plan_recommends(
    llama_folder: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The least loss of those that fit; here memory is so little that 8 bits are too much."""
    folder = llama_folder(hidden_size=256, intermediate_size=704, num_hidden_layers=2)
    own = tmp_path / "mine.json"
    large = goal("3090", "llama.cpp", 64)
    eight = row_of(open_model(folder), mixture("Q8_0"), large).placement.total
    thimble = {"name": "Thimble", "kind": "gpu", "memory_gib": 1, "usable_gib": (eight - 1) / GIB, "arch": "sm90"}
    own.write_text(json.dumps(thimble))
    words = ["quantize", folder, "-o", tmp_path / "out", "--context", "64", "--engine", "llama.cpp"]
    words += ["--dry-run", "--json"]
    assert run(*words, "--fit", "3090") == 0
    assert json.loads(capsys.readouterr().out)["scheme"] == "w8g32"
    assert run("devices", "--add", own) == 0
    capsys.readouterr()
    code = run(*words, "--fit", "thimble")
    told = json.loads(capsys.readouterr().out)
    assert (code, told.get("scheme")) == (0, "w4g32"), told
    assert any("fits thimble with llama.cpp at 64 tokens" in note for note in told["notes"])
    for more, message in (
        (["--fit", "3090", "--scheme", "w8"], "chooses the scheme"),
        (["--fit", "RTX 9999"], "no device"),
        ([], "--context is about --fit"),
        (["--fit", "apple watch"], "does not compute on"),
    ):
        assert run(*words, *more) == 2
        assert message in json.loads(capsys.readouterr().out)["message"]
