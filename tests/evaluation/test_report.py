"""The page: a function of the facts, whose numbers are theirs, whose texts are escaped, and which asks nobody."""

from __future__ import annotations

import html.parser
import http.server
import json
import math
import random
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LlamaFolder
from transformers import ViTConfig, ViTForImageClassification

import spicerack
from spicerack.cli import _output, cli
from spicerack.errors import CheckpointError
from spicerack.evaluation.report import lens, markup
from spicerack.evaluation.report.facts import collect
from spicerack.evaluation.report.page import page
from spicerack.machine import catalogue
from spicerack.models.overview import look
from spicerack.numerics import codec
from spicerack.numerics.scheme import parse
from spicerack.planning import engine as engines
from spicerack.planning.engine import Request
from spicerack.planning.model import open_model
from spicerack.planning.plan import Goal, plan
from spicerack.planning.sensitivity import Budget, Option, Point, Round, Sensitivity, Unit
from spicerack.planning.written import on_devices, shown_sensitivity
from spicerack.storage import files, ledger, records
from spicerack.storage.reader import Checkpoint

EVIL = "</script><img src=x onerror=alert(1)>\"'&{evil}\u202e"


def entry(name: str, block: int, **more: Any) -> dict[str, Any]:
    return {
        "tensor": f"model.layers.{block}.{name}.weight", "action": "quantize", "why": "recipe", "layer_type": name,
        "scheme": "w4g128", "dtype": "BF16", "shape": [8192, 8192], "bytes_before": 134217728, "bytes_after": 34603008,
        "error": 0.0971, "events": [], **more,
    }  # fmt: skip


def folder(path: Path, entries: list[dict[str, Any]]) -> Path:
    path.mkdir()
    identity = {"recipe": {"scheme": "w4g128", "range": "opt", "rules": []}, "source": "0" * 64}
    (path / "spicerack.json").write_text(json.dumps({"identity": identity, "tensors": entries}))
    return path


def decoder(**more: Any) -> dict[str, Any]:
    return {
        "compute": "int4/bfloat16", "text": "heldout.txt", "tokens": 4088, "windows": 8, "window": 512,
        "perplexity": 10.47, "perplexity_reference": 9.709, "kl_mean": 0.04797, "kl_mean_ci95": [0.0447, 0.0513],
        "kl_p999": 0.503, "top1_agreement": 0.9976, "unknown_tokens": 0.0, "kl_noise_floor": 0.00018, **more,
    }  # fmt: skip


def benched() -> dict[str, Any]:
    row = {"compute": "torch/bfloat16", "bytes_on_disk": 8921088, "resident_bytes": 8921344}
    speeds = {
        f"{name}_tokens_per_s{end}": value * factor
        for name, value in (("prefill", 645.0), ("decode", 41.5))
        for end, factor in (("", 1), ("_min", 0.8), ("_max", 1.1))
    }  # fmt: skip
    faster = {key: 2 * value for key, value in speeds.items()}
    rows = [{"name": "original", **row, **speeds}, {"name": "quantized", **row, **faster}]
    return {"rows": rows, "speedup": 2.0, "repeats": 5, "threads": 2, "device": "cpu"}


def estimated() -> dict[str, Any]:
    return {
        "how": "estimated", "joules_per_token": 0.313, "joules_per_token_range": [0.188, 0.438], "device": "RTX 3090",
        "floor_joules_per_token": 0.0021,
    }  # fmt: skip


def seen(weights: list[float]) -> dict[str, Any]:
    rounded = [
        {"bits": bits, "levels": [0.01 * (i - 2 ** (bits - 1)) for i in range(2**bits)], "error": 0.4 / 2**bits}
        for bits in lens.BITS
    ]
    return {"tensor": EVIL, "scheme": "w4g128", "weights": weights, "rounded": rounded}


def passage(which: str, word: str = " word") -> dict[str, Any]:
    """As `report.examples` makes one: six tokens, of which two are chosen otherwise."""
    tokens = [
        {"text": word, "kl": 0.01 * i, "original": word, "small": word if i % 3 else " other"} for i in range(1, 7)
    ]
    choices = [{"text": f"{word}{i}", "share": 0.3 - 0.04 * i} for i in range(5)]
    return {
        "which": which, "kl": 0.0351, "before": f"\n\nAnd so{word}", "tokens": tokens, "at": 5, "original": choices,
        "small": choices[::-1], "original_writes": f"{word} and on", "small_writes": f"{word} and off",
    }  # fmt: skip


def pair(typical: bool, text: str = "A sentence.") -> dict[str, Any]:
    return {"a": text, "b": f"Not {text}", "before": 0.123, "after": -0.0456, "typical": typical}


def sensed(name: str = "model.layers.{}.mlp.up_proj", scheme: str = "w4g128", count: int = 2) -> dict[str, Any]:
    """What a run with a budget leaves, of a few units, as planning shows it."""
    option = {"nbytes": 34603008, "bits": 276824064, "estimate": 0.0021}
    units = tuple(
        Unit(name.replace("{}", str(i)), ("w",), 67108864,
             {"w2g64": Option(**option, loss=0.0341 + i), scheme: Option(**option, loss=0.00241)}, scheme)
        for i in range(count)
    )  # fmt: skip
    curve = tuple(Point(60_000_000 + 1_500_000 * i, 3 + i / 16, 0.1 / 2**i) for i in range(30))
    rounds = (
        Round(69_300_000, 4.1, 0.0141, 0.0163, (0.0151, 0.0175), 16352, (0.021, 0.019, 0.023)),
        Round(69_206_016, 4.125, 0.0142, 0.0152, (0.0143, 0.0161), 16352),
    )
    known = shown_sensitivity(Sensitivity("kl", {}, 0, units, Budget("bits", 4.125), curve, rounds))
    assert isinstance(known, dict)
    return known


def places() -> list[dict[str, Any]]:
    about = {"engine": "llama.cpp", "context": 8192, "memory_bytes": 71_234_567}
    return [
        {**about, "device": "phone", "fits": True, "spare_bytes": 4_211_000_000, "longest_context": 65536,
         "tokens_per_s": 1234.5, "basis": "right within 20 % for 16 of 18 known cases"},
        {**about, "device": "watch", "fits": False, "spare_bytes": -1_711_000, "longest_context": None,
         "tokens_per_s": None, "basis": "no layer fits"},
        {"engine": "llama.cpp", "context": 8192, "device": "clock", "refused": "it does not compute there"},
    ]  # fmt: skip


def everything(path: Path) -> dict[str, Any]:
    return collect(path, {"devices": places(), "sensitivity": sensed()})


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    path = folder(tmp_path / "model", [entry("self_attn.q_proj", 0), entry("mlp.up_proj", 1, error=0.1234)])
    shown = {"kernels": [["layers.*.mlp", "int4", 2]], "examples": [passage("worst"), passage("typical")]}
    records.keep(path, "lens", seen([0.001 * i for i in range(-60, 68)]))
    records.keep(path, "eval", decoder(), against="float", **shown)
    records.keep(path, "bench", benched(), against="float")
    records.keep(path, "energy", estimated())
    return path


class Reader(html.parser.HTMLParser):
    """Texts outside scripts and styles; elements; attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, key, value) for key, value in attrs]
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"{tag} is closed"

    def handle_data(self, data: str) -> None:
        if not {"script", "style", "title", "pre", "code"} & set(self.open):
            self.texts.append(data)


def embedded(text: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="facts">(.*?)</script>', text, re.DOTALL)
    assert found
    facts = json.loads(found[1])
    assert isinstance(facts, dict)
    return facts


def numbers(value: Any) -> list[float]:
    if isinstance(value, bool) or value is None:
        return []
    if isinstance(value, (int, float)):
        return [value]
    if isinstance(value, str):
        return [float(n) for n in re.findall(r"\d+(?:\.\d+)?", value)]
    children = list(value.values()) if isinstance(value, dict) else list(value)
    return [len(children), *(n for child in children for n in numbers(child))]


def shown(n: float) -> set[str]:
    """All that a number may look like, by the functions that write numbers, as what a speed says of a page, and in
    per cent."""
    forms = {f"{n:g}", f"{n:,.0f}", f"{n:.2f}", f"{n:.5f}", markup.short(n), markup.short(100 * n), markup.whole(n)}
    forms.add(markup.size(abs(n)).split(" ")[0])
    if n >= 0:
        forms |= {markup.hundred(n), f"{markup.math_floor(n, 5):g}"}
    if n:
        forms.add(markup.short(500 / n))
    return {form.lstrip("-") for form in forms}


def test_every_number_on_the_page_is_in_the_json(measured: Path) -> None:
    facts = everything(measured)
    text = page(facts)
    assert embedded(text) == json.loads(json.dumps(facts))
    # of the page itself: "of 100", "where 1 is the same and 0 unrelated", a page of 500 tokens, "95 %", "99.9th",
    # float32, bfloat16, powers of 10, ranks, --bits 3.5
    allowed = {"100", "1", "0", "500", "95", "99.9", "32", "16", "10", "2", "3", "4", "5", "3.5"}
    for n in numbers(facts):
        allowed |= shown(n)
    words = re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?", " ".join(Reader(text).texts))
    assert len(words) > 100
    assert not [word for word in words if word.rstrip(",") not in allowed]


def test_it_asks_nobody(measured: Path) -> None:
    text = page(everything(measured))
    reader = Reader(text)
    assert not [
        a
        for a in reader.attributes
        if a[1] in ("src", "srcset", "action", "data", "poster", "style") and "url" in str(a[2])
    ]
    assert not [a for a in reader.attributes if a[1] == "src" or (a[1] == "href" and not str(a[2]).startswith("#"))]
    assert not {"link", "img", "iframe", "object", "embed", "base", "form"} & set(reader.tags)
    assert "http://" not in text and "https://" not in text and "url(" not in text and "@import" not in text
    assert "default-src 'none'" in text and not reader.open


def test_texts_of_strangers_are_texts(measured: Path) -> None:
    """In names of tensors and layers, in events and reasons, texts, commands and the folder's own name."""
    hostile = measured.rename(measured.parent / EVIL.replace("/", "-"))
    ledger = json.loads((hostile / "spicerack.json").read_text())
    for tensor in ledger["tensors"]:
        tensor |= {"tensor": EVIL + tensor["tensor"], "layer_type": EVIL, "why": EVIL, "events": [EVIL], "scheme": EVIL}
    (hostile / "spicerack.json").write_text(json.dumps(ledger))
    (hostile / "run.json").write_text(json.dumps({"command": ["spicerack", EVIL], "machine": {EVIL: EVIL}}))
    shown = {
        "kernels": [[EVIL, EVIL, 2]], "examples": [passage(EVIL, EVIL), pair(False, EVIL), pair(True, EVIL)],
    }  # fmt: skip
    records.keep(hostile, "lens", seen([0.1, -0.1, 0.3]))
    records.keep(hostile, "eval", decoder(text=EVIL, compute=EVIL), against=EVIL, **shown)
    devices = [
        {**row, **{key: EVIL for key in ("device", "engine", "basis", "refused") if key in row}} for row in places()
    ]
    text = page(collect(hostile, {"devices": devices, "sensitivity": sensed(EVIL + "model.layers.{}.x", EVIL)}))
    reader = Reader(text)
    assert not reader.open and "img" not in reader.tags and text.count("<script") == 2 == text.count("</script")
    assert not [a for a in reader.attributes if a[1].startswith("on")]
    assert embedded(text)["tensors"][0]["tensor"].startswith(EVIL)
    assert "\u202e" not in text  # it would turn what follows around


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium")
def test_a_browser_runs_no_script_of_strangers(measured: Path) -> None:
    """And sends no request: one that it would send is to a server here, which counts them."""
    asked: list[str] = []

    class Counting(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)

    server = http.server.HTTPServer(("127.0.0.1", 0), Counting)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    away = f"http://127.0.0.1:{server.server_port}"
    evil = (
        f"</script><script>document.title='ran';fetch('{away}/fetch')</script><img src='{away}/img' "
        f"onerror=\"document.title='ran'\"><link rel=stylesheet href={away}/css>"
    )
    written = json.loads((measured / "spicerack.json").read_text())
    written["tensors"][0]["tensor"] = evil
    (measured / "spicerack.json").write_text(json.dumps(written))
    shown = {"examples": [passage("worst", evil), pair(True, evil)], "kernels": [[evil, evil, 1]]}
    records.keep(measured, "eval", decoder(text=evil), against=evil, **shown)
    file = measured / "report.html"
    file.write_text(page(collect(measured, {"devices": None, "sensitivity": sensed(evil + ".{}.")})))
    words = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={measured / 'profile'}"]
    done = subprocess.run([*words, "--dump-dom", f"{file.as_uri()}#zh"], capture_output=True, text=True, timeout=60)
    server.shutdown()
    server.server_close()
    assert "<title>model · spicerack</title>" in done.stdout  # not ran
    assert 'data-lang="zh"' in done.stdout  # its own script did
    assert not asked


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    text = page(collect(folder(tmp_path / "bare", [entry("mlp.up_proj", 0)])))
    for command in ("eval OUT --against MODEL --text FILE", "bench OUT --against MODEL", "energy OUT"):
        assert f"spicerack {command}" in text
    assert "run.json" in text and 'class="lens"' not in text
    assert "was not measured yet" in text


def test_a_record_of_another_ledger_is_not_believed(measured: Path) -> None:
    path = measured / "spicerack.json"
    path.write_text(path.read_text().replace("w4g128", "w3g128"))
    facts = collect(measured)
    assert facts["lens"] is facts["eval"] is facts["bench"] is facts["energy"] is None


def test_both_languages_say_the_same_numbers(measured: Path) -> None:
    text = page(everything(measured))
    pairs = re.findall(
        r'<span lang="en" class="t">(.*?)</span><span lang="zh-CN" class="t">(.*?)</span>', text, re.DOTALL
    )
    assert len(pairs) > 50
    assert all(chinese for _, chinese in pairs)
    languages = re.findall(r'lang="(en|zh-CN)" class="t"', text)
    assert languages.count("en") == languages.count("zh-CN")
    values = [[sorted(re.findall(r"<b>(.*?)</b>", words)) for words in both] for both in pairs]
    assert all(english == chinese for english, chinese in values) and any(english for english, _ in values)


def test_chinese_has_punctuation_of_its_own_width() -> None:
    def chinese(words: str) -> str:
        return re.findall(r'zh-CN" class="t">(.*?)</span>', markup.say("", words, n=7, code="a, b"))[0]

    wide = {sign: chr(ord(sign) + 0xFEE0) for sign in ",:;()?!"}
    assert chinese("甲,乙:{n},丙") == f"甲{wide[',']}乙{wide[':']}7{wide[',']}丙"
    assert (
        chinese("甲(7 %),乙") == f"甲{wide['(']}7 %{wide[')']}{wide[',']}乙"
        and chinese("KL(nat/词)") == f"KL{wide['(']}nat/词{wide[')']}"
    )
    assert chinese("{code}; f(x), 1,000:") == "a, b; f(x), 1,000:".replace("b;", f"b{wide[';']}")


def test_it_never_rounds_up_to_all(measured: Path) -> None:
    assert markup.hundred(0.9999) == "99.9" and markup.hundred(1.0) == "100" and markup.hundred(0.89) == "89"
    assert "<b>99.7</b>" in page(collect(measured))


def test_a_large_model_has_a_small_page(tmp_path: Path) -> None:
    """70B: 80 layers of nine tensors; and a mixture of 60 layers with 256 experts of three."""
    kinds = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    dense = [entry(kind, i) for i in range(80) for kind in kinds]
    dense += [entry(n, i, action="copy", scheme=None, error=None) for i in range(80) for n in ("norm", "post_norm")]
    more = {"devices": places(), "sensitivity": sensed(count=80 * 4)}
    assert len(page(collect(folder(tmp_path / "dense", dense), more))) < 2_000_000
    experts = [
        entry(f"mlp.experts.{e}.{x}_proj", i, layer_type=f"mlp.experts.*.{x}_proj")
        for i in range(60) for e in range(256) for x in ("gate", "up", "down")
    ]  # fmt: skip
    facts = collect(folder(tmp_path / "mixture", experts), {**more, "sensitivity": sensed(count=5000)})
    assert len(facts["sensitivity"]["units"]) == 1000 and facts["sensitivity"]["units_left_out"] == 4000
    assert facts["tensors_left_out"] == 46080 - 1000 and len(page(facts)) < 2_000_000


def test_the_lens_is_the_codec(llama_folder: LlamaFolder, tmp_path: Path) -> None:
    source = llama_folder()
    spicerack.quantize(source, "w4g32", output=tmp_path / "out")
    row = lens.look(tmp_path / "out", source)
    assert row is not None and len(row["weights"]) == 32
    w = torch.tensor(row["weights"])[None]
    for rounded in row["rounded"]:
        decoded = codec.decode(codec.encode(w, parse(f"w{rounded['bits']}")))[0]
        assert float((decoded - w).norm() / w.norm()) == pytest.approx(rounded["error"], rel=1e-3)
        levels = torch.tensor(rounded["levels"])
        assert len(levels) == 2 ** rounded["bits"]
        assert (decoded[:, None] - levels).abs().amin(1).max() < 1e-5


def test_the_commands(measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _output.run(cli, ["report", str(measured), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result.pop("page") == str(measured / "report.html")
    assert embedded((measured / "report.html").read_text()) == result
    assert _output.run(cli, ["report", str(measured), "-o", str(tmp_path / "nowhere" / "page.html")]) == 2
    assert "-o FILE" in capsys.readouterr().err
    assert _output.run(cli, ["report", str(tmp_path)]) == 2
    assert "spicerack.json" in capsys.readouterr().err


def test_what_commands_leave(llama_folder: LlamaFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """eval and bench keep what they print, and it is no part of the model."""
    source, out = str(llama_folder()), str(tmp_path / "out")
    spicerack.quantize(source, "w4g32", output=out)
    before = files.find(Path(out)).side_files
    (tmp_path / "text.txt").write_text("one word after another, " * 200)
    for words in (
        ["eval", out, "--against", source, "--text", str(tmp_path / "text.txt"), "--window", "16"],
        ["bench", out, "--against", source, "--repeats", "1", "--prefill", "4", "--decode", "2"],
    ):
        assert _output.run(cli, [*words, "--json"]) == 0
        record = records.read(Path(out), words[0])
        assert record is not None and record["result"] == json.loads(capsys.readouterr().out)
        assert record["against"] == source
    assert _output.run(cli, ["report", out]) == 0
    assert "missing, and said so on the page: energy, sensitivity" in capsys.readouterr().out
    text = Path(out, "report.html").read_text()
    assert 'class="lens"' in text and "The worst passage" in text and "A typical passage" in text
    assert files.find(Path(out)).side_files == before


def test_damaged_records(measured: Path) -> None:
    (measured / "eval.json").write_text("[1")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        collect(measured)
    (measured / "eval.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no record of spicerack eval"):
        collect(measured)


@pytest.mark.parametrize("name", ["lens", "eval", "bench", "energy"])
def test_a_record_that_lacks_anything_is_named_and_no_page_is_written(measured: Path, name: str) -> None:
    """Whatever is taken out of it, or becomes another type: an error with its name, or the page of another record."""
    path = measured / f"{name}.json"
    right = json.loads(path.read_text())
    refused = 0
    for where in [*_places(right)]:
        for other in (None, "text", [1], {"a": None}, -1.5):
            record = json.loads(path.read_text())
            inner = record
            for key in where[:-1]:
                inner = inner[key]
            if inner[where[-1]] == other:
                continue
            inner[where[-1]] = other
            path.write_text(json.dumps(record))
            try:
                page(collect(measured))
            except CheckpointError as error:
                assert f"{name}.json" in error.message
                refused += 1
            path.write_text(json.dumps(right))
    assert refused > 15


def _places(value: Any) -> Iterator[tuple[Any, ...]]:
    """Where something is, from the outside; of lists the first."""
    items = value.items() if isinstance(value, dict) else list(enumerate(value))[:1] if isinstance(value, list) else ()
    for key, inner in items:
        yield (key,)
        yield from ((key, *rest) for rest in _places(inner))


def test_other_damaged_files_are_named(measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content in (
        ("run.json", '{"command": 3}'), ("sensitivity.json", '{"version": 1, "metric": "kl"}'),
        ("spicerack.json", '{"identity": {}, "tensors": [], "check": {"kl_mean": "x"}}'),
        ("config.json", "[]"), ("run.json", '{"odd": ' + "[" * 900 + "]" * 900 + "}"),
    ):  # fmt: skip
        before = (measured / name).read_text() if (measured / name).is_file() else None
        (measured / name).write_text(content)
        assert _output.run(cli, ["report", str(measured), "--json"]) == 2
        told = json.loads(capsys.readouterr().out)
        assert told["error"] == "CheckpointError" and name in told["message"]
        assert not (measured / "report.html").exists()
        if before is None:
            (measured / name).unlink()
        else:
            (measured / name).write_text(before)


STRANGE = (None, 0, -1, 1e308, -1e308, 10**400, math.nan, math.inf, "x", "<script>", [], {}, True, [None], -0.0, 1e-320)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Places in JSON, of lists the first four."""
    if not isinstance(value, (dict, list)):
        return [path]
    children = list(value.items()) if isinstance(value, dict) else list(enumerate(value))[:4]
    return [place for key, child in children for place in leaves(child, (*path, key))]


@pytest.mark.parametrize("name", ["spicerack", "lens", "eval", "bench", "energy"])
def test_any_value_may_be_anything(measured: Path, name: str) -> None:
    """A page, or an error that names what is wrong: integers that no float can be, nothing to divide by."""
    path = measured / f"{name}.json"
    before = json.loads(path.read_text())
    kept = [records.read(measured, command) for command in ("lens", "eval", "bench", "energy")]
    some = random.Random(name)
    for place in some.sample(places := leaves(before), min(60, len(places))):
        changed = json.loads(json.dumps(before))
        inner = changed
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = some.choice(STRANGE)
        path.write_text(json.dumps(changed))
        try:
            if name == "spicerack" and (written := ledger.read(measured)) is not None:
                for record in kept:  # believed still
                    assert record is not None
                    again = {**record, "ledger": written.sha256}
                    (measured / f"{record['command']}.json").write_text(json.dumps(again))
            page(collect(measured))
        except CheckpointError as error:
            assert error.message.isprintable() and error.hint


def test_a_check_behind_quantize_is_shown_where_there_is_no_evaluation(measured: Path) -> None:
    (measured / "eval.json").unlink()
    ledger.keep_check(measured, decoder(top1_agreement=0.9123, top1_agreement_ci95=[0.9, 0.92]))
    text = page(collect(measured))
    assert "<b>91.2</b>" in text and "short check behind quantize" in text and "90 and 92" in re.sub("<.*?>", "", text)


def test_what_a_budget_measured_is_shown_where_there_is_no_evaluation(measured: Path) -> None:
    (measured / "eval.json").unlink()
    text = page(collect(measured, {"devices": None, "sensitivity": sensed()}))
    assert "on 16,352 words held out: <b>0.0152</b>, between 0.0143 and 0.0161" in text
    assert "was not measured yet" not in text and "spicerack eval" in text
    known = sensed()
    known["rounds"] = known["rounds"][::-1]
    words = re.sub("<.*?>", "", page(collect(measured, {"devices": None, "sensitivity": known})))
    assert "hesitates between 100 next words, this model does between 102.1 (101.9 to 102.3)" in words


def test_the_slider_begins_at_the_bits_of_the_codes(measured: Path) -> None:
    """Not at what a weight takes with its scales: 4.63 bits of w4g32z are 4."""
    row = {**seen([0.01, -0.02, 0.03]), "scheme": "w4g32z"}
    records.keep(measured, "lens", row)
    for scheme, begins in (("w4g32z", 4), ("q3_k", 3), ("w2g128h", 2), ("<b>", 6)):
        records.keep(measured, "lens", {**row, "scheme": scheme})
        text = page({**collect(measured), "bits_quantized": 6.1})
        assert f'id="bits" min="2" max="8" step="1" value="{begins}"' in text


def test_what_was_measured_says_on_which_machine(measured: Path) -> None:
    facts = collect(measured)
    processor = facts["bench"]["machine"]["processor"]
    assert processor and f"machine: {processor}." in re.sub("<.*?>", "", page(facts))
    facts["run"] = {"command": ["/home/somebody/.venv/bin/spicerack", "quantize", "MODEL"]}
    text = page(facts)
    made = text[text.index("Made by:") : text.index("</code>", text.index("Made by:"))]
    assert made.endswith("spicerack quantize MODEL") and "somebody" not in made


def test_devices_are_those_that_everybody_has(
    llama_folder: LlamaFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page is sent to others: a card that somebody calls RTX 3090 is not theirs; a file of one's own may be any."""
    spicerack.quantize(llama_folder(), "w8", output=tmp_path / "out")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    before = on_devices(tmp_path / "out")
    own = tmp_path / "spicerack" / "devices.json"
    own.parent.mkdir()
    for text in ('{"name": "RTX 3090", "memory_gib": 4000}', "{"):
        own.write_text(text)
        assert on_devices(tmp_path / "out") == before


def test_a_model_of_pictures_has_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=32)
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    spicerack.quantize(tmp_path / "vit", "w8", output=tmp_path / "out", check=True)
    assert _output.run(cli, ["report", str(tmp_path / "out")]) == 0
    assert "missing" not in capsys.readouterr().out
    text = (tmp_path / "out" / "report.html").read_text()
    assert "which reads pictures, not text" in text and "spicerack eval" not in text and "spicerack bench" not in text
    assert "Where the bits went" in text and 'class="lens"' in text and not Reader(text).open


@pytest.mark.parametrize("scheme", ["w8", "w4g32z", "w2g32z"])
def test_inspect_plan_dry_run_and_page_say_the_same_bytes(
    llama_folder: LlamaFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str], scheme: str
) -> None:
    """Of three models: untied, tied, and with narrow layers that get another scheme; and so do the files."""
    for number, more in enumerate(({}, {"tie_word_embeddings": True}, {"intermediate_size": 176})):
        source, out = llama_folder(f"model{number}", **more), tmp_path / f"out{number}"
        words = ["quantize", str(source), "-o", str(out), "--scheme", scheme, "--fit-groups", "--no-check", "--json"]
        assert _output.run(cli, [*words, "--dry-run"]) == 0
        foretold = json.loads(capsys.readouterr().out)["bytes_after"]
        estimate = next(e.nbytes for e in look(source).estimates if e.scheme == scheme)
        goal = Goal(catalogue.find("24GB"), engines.get("spicerack"), Request(64, 1, 16))
        row = next(r for r in plan(open_model(source), goal).rows if r.precision.scheme == scheme)
        assert _output.run(cli, words) == 0 and capsys.readouterr()
        assert _output.run(cli, ["report", str(out), "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        written = sum(info.nbytes for info in Checkpoint.open(out).tensors.values())
        assert foretold == facts["bytes_after"] == estimate == row.weights.file == written


def test_an_encoder_has_a_page(measured: Path) -> None:
    result = {
        "compute": "int4/float32", "text": "built-in sentences", "tokens": 2210, "sentences": 100,
        "cosine_mean": 0.997189,
        "cosine_min": 0.9912, "spearman": None, "unknown_tokens": 0.0, "cosine_noise_floor": 0.99998,
    }  # fmt: skip
    records.keep(measured, "eval", result, against="float")
    text = page(collect(measured))
    assert "<b>0.99718</b>" in text and "0.99998" in text and 'class="dots"' not in text
    shown = {"examples": [pair(False), pair(True, "Another.")]}
    records.keep(measured, "eval", {**result, "cosine_noise_floor": None}, against="float", **shown)
    text = page(collect(measured))
    assert "<q>Another.</q>" in text and "moved most" in text
    assert "0.99998" not in page(collect(measured))
