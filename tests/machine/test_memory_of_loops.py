"""Long loops stay at the memory of one step: measured on the process, and asked behind every step of every loop."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from calibrations import text
from conftest import LlamaFolder, byte_tokenizer
from transformers import BertConfig, BertModel

import spicerack
from spicerack.evaluation.evaluate import EvaluationOptions, measure
from spicerack.machine import memory
from spicerack.runtime.generate import GenerateOptions, generate
from spicerack.text.generated import from_model

_LOOP = """
import json, sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
from spicerack.evaluation import language
from spicerack.machine.memory import anonymous_bytes
from spicerack.text.windows import Window
torch.set_num_threads(1)
small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
a, b = (LlamaForCausalLM(LlamaConfig(vocab_size=4096, **small)).eval() for _ in range(2))
marks = []
windows = (Window(torch.randint(4096, (256,)), 0, 0.0) for _ in range(60))
language.compare(a, b, windows, progress=lambda _: marks.append(anonymous_bytes()))
print(json.dumps(marks))
"""


@pytest.mark.slow
@pytest.mark.skipif(memory.anonymous_bytes() is None, reason="Linux alone tells")
def test_an_evaluation_does_not_grow_with_its_text() -> None:
    """Without giving back, this one grows by 6 MB a window, 300 MB from a tenth of it to the end."""
    run = subprocess.run([sys.executable, "-c", _LOOP], capture_output=True, text=True, check=True)
    marks = json.loads(run.stdout)
    assert marks[-1] - marks[len(marks) // 10] < 1.5 * memory.GROWTH


def test_memory_is_given_back_when_much_came_on_top(monkeypatch: pytest.MonkeyPatch) -> None:
    trims: list[int] = []
    heap = memory._Heap(lambda pad: trims.append(pad) or 1)
    now = 100 << 20
    monkeypatch.setattr(memory, "anonymous_bytes", lambda: now)
    for now, count in ((100 << 20, 1), (163 << 20, 1), (165 << 20, 2), (166 << 20, 2), (90 << 20, 2), (231 << 20, 3)):
        heap.settle()
        assert len(trims) == count, now
    nothing = memory._Heap(None)
    nothing.settle()
    assert nothing.floor == 0


def test_the_c_library_is_asked() -> None:
    assert memory._of_c("no_such_function") is None
    if sys.platform == "linux":
        trim = memory._of_c("malloc_trim")
        assert trim is None or trim(0) in (0, 1)


class Counting:
    """In the heap's place. askers: the modules whose loops asked it, each with how often it did."""

    def __init__(self) -> None:
        self.askers: Counter[str] = Counter()

    def settle(self) -> None:
        frame = sys._getframe(1)
        while frame.f_globals["__name__"] == memory.__name__:
            assert frame.f_back is not None
            frame = frame.f_back
        self.askers[frame.f_globals["__name__"].removeprefix("spicerack.")] += 1


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    heap = Counting()
    monkeypatch.setattr(memory, "_heap", lambda: heap)
    return heap


@pytest.mark.slow
def test_every_long_loop_asks_behind_each_step(llama_folder: LlamaFolder, tmp_path: Path, counting: Counting) -> None:
    folder, out, words = llama_folder(), tmp_path / "out", tmp_path / "text.txt"
    words.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    spicerack.quantize(folder, "w4g32", output=out)
    assert counting.askers == {"quantization.stream": 21}, "a tensor is a step of writing"
    for doing in (evaluated, embedded, generated, written, calibrated, exported, trained):
        counting.askers.clear()
        for asker, least in doing(folder, out, words).items():
            assert counting.askers[asker] >= least, (doing, asker)


def evaluated(folder: Path, out: Path, words: Path) -> dict[str, int]:
    figures: Any = measure(out, against=folder, options=EvaluationOptions(text=words, window=64)).figures
    return {"evaluation.language": 2 * len(figures.kl)}  # once more in bfloat16


def embedded(folder: Path, _out: Path, _words: Path) -> dict[str, int]:
    config = BertConfig(
        vocab_size=257, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    )
    bert, lines = folder.with_name("bert"), folder.with_name("lines.txt")
    BertModel(config).save_pretrained(bert)
    for path in folder.glob("tokenizer*"):
        shutil.copy(path, bert)
    lines.write_text("\n".join(f"sentence {number} of some" for number in range(65)))
    spicerack.quantize(bert, "w4", output=f"{bert}-w4")
    measure(f"{bert}-w4", against=bert, options=EvaluationOptions(text=lines))
    return {"evaluation.encoder": 2 * 3}  # of 32 sentences


def generated(folder: Path, _out: Path, _words: Path) -> dict[str, int]:
    return {"runtime.generate": generate(folder, "def f(", GenerateOptions(max_new_tokens=8)).tokens}


def written(folder: Path, _out: Path, _words: Path) -> dict[str, int]:
    from_model(spicerack.load(folder), byte_tokenizer(), samples=2, length=8, seed=0)
    return {"text.generated": 7}


def calibrated(folder: Path, out: Path, _words: Path) -> dict[str, int]:
    spicerack.quantize(folder, "w4g32", output=f"{out}-gptq", method="gptq", calibration=text())
    return {"quantization.calibration.loop": 2, "quantization.calibration.flow": 14, "quantization.stream": 21}


def exported(_folder: Path, out: Path, _words: Path) -> dict[str, int]:
    spicerack.export(out, to="mlx", output=f"{out}-mlx")
    return {"exports.verify": 21}


def trained(folder: Path, out: Path, words: Path) -> dict[str, int]:
    settings = spicerack.Settings(steps=3, batch=2, length=16)
    spicerack.train(folder, f"{out}-trained", data=words, scheme="w4g32", settings=settings)
    return {"training.callbacks": 3}
