"""`spicerack train`, in one process, on tiny models."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LlamaFolder
from folders import codes
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM

import spicerack
from spicerack import QATConfig, Settings
from spicerack.cli import _output, cli
from spicerack.errors import OutputError, SchemeError, SpicerackError, TextError, TrainingError, UsageError
from spicerack.training.run import Trained, train

pytestmark = pytest.mark.slow

SMALL: dict[str, Any] = {"steps": 6, "batch": 4, "length": 32, "eval_every": 3, "save_every": 3, "log_every": 1}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Words that follow each other by rule: something to learn."""
    file, letters = tmp_path / "text.txt", random.Random(0)
    words = ["alpha beta", "gamma delta", "epsilon zeta", "one two three"]
    file.write_text(" ".join(letters.choice(words) for _ in range(800)))
    return file


def settings(**more: Any) -> Settings:
    return Settings(**SMALL | more)


def run(source: Path, out: Path, text: Path, scheme: str | None = "w4g32", **more: Any) -> Trained:
    given = {name: more.pop(name) for name in list(more) if name in Settings.__dataclass_fields__}
    return train(source, out, data=text, scheme=scheme, settings=settings(**given), **more)


def first_kl(checkpoint: Path) -> float:
    """The divergence from the teacher when it was first measured, three steps into a run."""
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return float(next(entry["eval_kl"] for entry in history if "eval_kl" in entry))


def test_a_trained_folder(llama_folder: LlamaFolder, text: Path, tmp_path: Path) -> None:
    """Learns, ships what it learned, and says so."""
    notes: list[str] = []
    trained = run(llama_folder(), tmp_path / "out", text, "w2g32h", steps=30, lr=3e-3, notify=notes.append)
    assert trained.loss_float == pytest.approx(5.56, abs=0.05)  # ln 257
    assert trained.loss_trained < 4
    assert trained.loss_shipped == pytest.approx(trained.loss_trained, abs=0.02)
    assert notes[-1].startswith("3,840 tokens in 30 steps")
    model = spicerack.load(tmp_path / "out")
    assert "w2g32h" in str(model.model.layers[0].mlp.up_proj)
    report = json.loads((tmp_path / "out" / "training.json").read_text())
    assert report["loss_trained"] == trained.loss_trained
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert any((tmp_path / "out.training" / "logs").iterdir())


def test_codes_are_those_of_the_last_checkpoint(llama_folder: LlamaFolder, text: Path, tmp_path: Path) -> None:
    """The weights in the checkpoint round to what was shipped, with scales in bfloat16, as they are stored."""
    source = llama_folder(dtype=torch.bfloat16)
    run(source, tmp_path / "out", text, bf16=True, lr=1e-2)
    model = spicerack.load(source, dtype=torch.float32)
    spicerack.prepare_qat(model, "w4g32", config=QATConfig(stored="bfloat16"))
    model.load_state_dict(load_file(tmp_path / "out.training" / "checkpoint-6" / "model.safetensors"))
    weight = model.model.layers[1].mlp.down_proj
    shipped = codes(tmp_path / "out")["model.layers.1.mlp.down_proj"]
    scale = weight.weight_scale.detach().to(torch.bfloat16).float()
    rounded = (weight.weight.detach() / scale.repeat_interleave(32, 1)).round().clamp(-8, 7)
    assert torch.equal(shipped.reshape(rounded.shape).float(), rounded)
    assert spicerack.load(tmp_path / "out").dtype == torch.bfloat16


@pytest.mark.parametrize("slow", ["embedding_lr", "scale_lr"])
def test_embeddings_and_scales_have_rates_of_their_own(
    llama_folder: LlamaFolder, text: Path, tmp_path: Path, slow: str
) -> None:
    """One that is next to nothing leaves them where they were, and all others move."""
    source = llama_folder(tie_word_embeddings=slow == "embedding_lr")
    begun = spicerack.prepare_qat(spicerack.load(source, dtype=torch.float32), "w4g32").state_dict()
    run(source, tmp_path / "out", text, lr=1e-2, weight_decay=0.1, **{slow: 1e-30})
    ended = load_file(tmp_path / "out.training" / "checkpoint-6" / "model.safetensors")
    still = {name for name, tensor in ended.items() if torch.equal(tensor, begun[name])}
    part = {"embedding_lr": "embed_tokens.weight", "scale_lr": "weight_scale"}[slow]
    assert still == {name for name in ended if name.endswith(part)} != set()
    curves = json.loads((tmp_path / "out.training" / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    assert max(line.get("learning_rate", 0) for line in curves) == pytest.approx(1e-2)


def test_a_teacher_and_its_predictions(llama_folder: LlamaFolder, text: Path, tmp_path: Path) -> None:
    """The float model guides: the student nears it. Kept predictions make a second run all but the same."""
    source = llama_folder(initializer_range=0.2)
    one = run(source, tmp_path / "one", text, "w2g32h", teacher=source, kl=1.0, steps=20, lr=1e-3)
    assert one.kl is not None
    assert one.kl < 0.9 * first_kl(tmp_path / "one.training" / "checkpoint-18")  # .57 to .75 over eight seeds
    for name in ("two", "three"):
        run(source, tmp_path / name, text, teacher=source, predictions=tmp_path / "kept")
    assert (tmp_path / "two" / "model.safetensors").read_bytes() == (
        tmp_path / "three" / "model.safetensors"
    ).read_bytes()


def test_float_runs_are_ordinary_folders(llama_folder: LlamaFolder, text: Path, tmp_path: Path) -> None:
    trained = run(llama_folder(), tmp_path / "out", text, None, dtype="float16")
    assert trained.loss_rounded is None
    assert spicerack.load(tmp_path / "out").dtype == torch.float16


def test_from_scratch_as_bitnet(llama_folder: LlamaFolder, text: Path, tmp_path: Path) -> None:
    source = llama_folder()
    trained = run(
        source / "config.json", tmp_path / "out", text, "ternarya8", twin="bitnet", schedule="two-stage",
        weight_decay=0.1, steps=40, lr=3e-3,
    )  # fmt: skip
    assert trained.loss_trained < 3.5
    model = spicerack.load(tmp_path / "out")
    assert type(model).__name__ == "BitNetForCausalLM"
    assert trained.loss_shipped == pytest.approx(trained.loss_trained, abs=0.03)


def test_a_warm_twin_has_the_llamas_weights(llama_folder: LlamaFolder, text: Path, tmp_path: Path) -> None:
    source = llama_folder()
    run(source, tmp_path / "out", text, None, twin="subln", steps=1, lr=1e-30)
    twin, llama = spicerack.load(tmp_path / "out"), spicerack.load(source)
    assert type(twin).__name__ == "BitNetForCausalLM"
    assert torch.equal(twin.model.layers[1].mlp.up_proj.weight, llama.model.layers[1].mlp.up_proj.weight)


def test_a_quantized_folder_trains_on(llama_folder: LlamaFolder, text: Path, tmp_path: Path) -> None:
    """With its weights, or with its scales alone, whose codes stay; from where it was."""
    source = llama_folder(initializer_range=0.2)
    spicerack.quantize(source, "w2g32h", output=tmp_path / "small")
    for name, alone in (("all", False), ("scales", True)):
        trained = run(tmp_path / "small", tmp_path / name, text, None, teacher=source, kl=1.0, steps=20, lr=1e-2,
                   scales_only=alone)  # fmt: skip
        before, after = codes(tmp_path / "small"), codes(tmp_path / name)
        assert all(torch.equal(before[key], after[key]) for key in before) == alone
        # The teacher knows nothing of the text: what is learned is its predictions. .58 to .83 over eight seeds.
        assert trained.kl is not None and trained.kl < 0.95 * first_kl(tmp_path / f"{name}.training" / "checkpoint-18")
        assert trained.loss_rounded is not None and trained.loss_shipped == pytest.approx(
            trained.loss_trained, abs=0.02
        )


def test_scales_alone_have_no_quantizer_and_no_embeddings(
    llama_folder: LlamaFolder, text: Path, tmp_path: Path
) -> None:
    spicerack.quantize(llama_folder(), "w4g32", output=tmp_path / "small")
    with pytest.raises(UsageError, match="nothing is rounded"):
        run(tmp_path / "small", tmp_path / "out", text, None, scales_only=True, config=QATConfig("seq"))
    with pytest.raises(UsageError, match="embeddings do not train"):
        run(tmp_path / "small", tmp_path / "out", text, None, scales_only=True, embedding_lr=1e-4)


@pytest.mark.parametrize("scheme", [None, "ternary"])
def test_a_rate_for_scales_needs_some_that_are_learned(
    llama_folder: LlamaFolder, text: Path, tmp_path: Path, scheme: str | None
) -> None:
    with pytest.raises(UsageError, match="no scale is learned"):
        run(llama_folder(), tmp_path / "out", text, scheme, scale_lr=1e-4)


def test_tied_and_quantized(llama_folder: LlamaFolder, text: Path, tmp_path: Path) -> None:
    """Checkpoints of weights and scales that two layers have in common; trained, continued, shipped, trained on."""
    source = llama_folder(tie_word_embeddings=True)
    run(source, tmp_path / "whole", text, rules=["lm_head=w8"])
    steps = iter(range(100))
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "out", text, rules=["lm_head=w8"], stopping=lambda: next(steps) == 1)
    run(source, tmp_path / "out", text, rules=["lm_head=w8"])
    whole, continued = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(whole[name], continued[name]) for name in whole)
    run(tmp_path / "out", tmp_path / "more", text, None)
    run(tmp_path / "out", tmp_path / "scales", text, None, scales_only=True)
    for name in ("more", "scales"):
        model = spicerack.load(tmp_path / name)
        assert model.lm_head.packed is model.model.embed_tokens.packed


def test_ctrl_c_and_on(llama_folder: LlamaFolder, text: Path, tmp_path: Path) -> None:
    """Stopped behind a step that has no checkpoint of its own; the same bytes as if it had not been."""
    source = llama_folder()
    run(source, tmp_path / "whole", text, seed=5)
    steps = iter(range(100))
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "out", text, seed=5, stopping=lambda: next(steps) == 1)
    trained = run(source, tmp_path / "out", text, seed=5)
    assert trained.resumed_at == 2
    for file in ("model.safetensors", "training.json", "spicerack.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_half_a_checkpoint_is_none(llama_folder: LlamaFolder, text: Path, tmp_path: Path) -> None:
    source = llama_folder()
    steps = iter(range(100))
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "out", text, stopping=lambda: next(steps) == 3)
    (tmp_path / "out.training" / "checkpoint-4" / "complete").unlink()
    (tmp_path / "out.training" / "checkpoint-4" / "optimizer.pt").unlink()
    assert run(source, tmp_path / "out", text).resumed_at == 3


def test_nan_stops_with_the_last_good_checkpoint(llama_folder: LlamaFolder, text: Path, tmp_path: Path) -> None:
    """A weight turns to NaN behind step 4; the checkpoint of step 3 stays, and is a model folder."""
    source = llama_folder()

    from transformers import TrainerCallback

    class Poison(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 4:
                kwargs["model"].model.norm.weight.data.fill_(float("nan"))

    with pytest.raises(TrainingError, match="step 5: the loss is nan") as raised:
        run(source, tmp_path / "out", text, callbacks=[Poison()])
    folder = tmp_path / "out.training" / "checkpoint-3"
    assert str(folder) in raised.value.hint
    assert not (tmp_path / "out").exists()
    with pytest.warns(UserWarning, match="no use for"):
        assert spicerack.load(folder).model.norm.weight.isfinite().all()


def test_gradients_that_are_not_finite_change_nothing(llama_folder: LlamaFolder, text: Path, tmp_path: Path) -> None:
    from transformers import TrainerCallback

    class Poison(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            weight = kwargs["model"].model.norm.weight
            self.before = weight.detach().clone()
            self.weight = weight
            if state.global_step == 1:
                weight.register_hook(lambda gradient: gradient * float("inf"))

    poison = Poison()
    with pytest.raises(TrainingError, match=r"step 2: the gradients' norm is (inf|nan)"):
        run(llama_folder(), tmp_path / "out", text, callbacks=[poison])
    assert torch.equal(poison.weight, poison.before)


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_another_recipe_does_not_continue(llama_folder: LlamaFolder, text: Path, tmp_path: Path) -> None:
    source = llama_folder()
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "out", text, stopping=lambda: True)
    others = (({"scheme": "w2g32h"}, "recipe"), ({"lr": 1e-3}, "settings"), ({"teacher": source}, "teacher"))
    for more, setting in others:
        with pytest.raises(OutputError, match=f"begun with another {setting}"):
            run(source, tmp_path / "out", text, **more)
    assert (tmp_path / "out.training" / "checkpoint-1" / "complete").exists()
    run(source, tmp_path / "out", text)
    with pytest.raises(OutputError, match="exists"):  # of the same command there is nothing left to do
        run(source, tmp_path / "out", text, lr=1e-3)


def test_before_the_first_checkpoint_a_command_may_be_corrected(
    llama_folder: LlamaFolder, text: Path, tmp_path: Path
) -> None:
    """There is nothing to lose yet; what was packed for the other command is not taken."""
    source = llama_folder()
    for wrong in ({"length": 129}, {"batch": 10**6}):
        with pytest.raises(UsageError):
            run(source, tmp_path / "out", text, **wrong)
    run(source, tmp_path / "out", text)
    run(source, tmp_path / "fresh", text)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "fresh"))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_checkpointing_computes_the_same(llama_folder: LlamaFolder, text: Path, tmp_path: Path) -> None:
    source = llama_folder()
    kept, again = (run(source, tmp_path / str(c), text, checkpointing=c, lr=1e-2) for c in (False, True))
    assert again.loss_trained == pytest.approx(kept.loss_trained, abs=1e-5)


def test_teachers_of_other_vocabularies(llama_folder: LlamaFolder, text: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="predicts 300 tokens, the model 257"):
        run(llama_folder(), tmp_path / "out", text, teacher=llama_folder("teacher", vocab_size=300))


def test_teachers_that_predict_something_else(llama_folder: LlamaFolder, text: Path, tmp_path: Path) -> None:
    """With as many tokens: another kind of model, and one whose tokens have other numbers."""
    student, shifted = llama_folder(), llama_folder("shifted")
    words = json.loads((shifted / "tokenizer.json").read_text())
    words["model"]["vocab"] = {token: (number + 1) % 256 for token, number in words["model"]["vocab"].items()}
    words["added_tokens"], words["model"]["vocab"]["<|end|>"] = [], 256
    (shifted / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(UsageError, match=r"another tokenizer: '.+' is"):
        run(student, tmp_path / "out", text, teacher=shifted)
    config = BertConfig(
        vocab_size=257, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    )
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(UsageError, match="bert is no model that predicts tokens"):
        run(student, tmp_path / "out", text, teacher=tmp_path / "bert")


@pytest.mark.parametrize(("more", "error", "match"), [
    ({"batch": 10**6}, TextError, "a batch needs 1000000"),
    ({"length": 129}, UsageError, "the model has 128 positions"),
    ({"scheme": "nf4"}, SchemeError, "not trained: its levels are a table"),
    ({"scheme": "w4g48"}, SpicerackError, "48"),
    ({"rules": ["nothing=w8"]}, SpicerackError, "nothing"),
    ({"data": "missing.txt"}, TextError, "missing.txt"),
    ({"predictions": "kept"}, UsageError, "no teacher"),
    ({"twin": "other"}, UsageError, "no twin"),
    ({"fsdp": True}, UsageError, "several processes"),
])  # fmt: skip
def test_what_cannot_be(
    more: dict[str, Any], error: type[Exception], match: str, llama_folder: LlamaFolder, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=match):
        run(llama_folder(), tmp_path / "out", Path(more.pop("data", text)), **more)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_is_damaged(llama_folder: LlamaFolder, tmp_path: Path, text: Path) -> None:
    """A weight that is NaN before anything is trained."""
    source = llama_folder()
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(TrainingError, match="held-out loss is not finite"):
        run(source, tmp_path / "out", text)


def test_the_command(llama_folder: LlamaFolder, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", llama_folder(), "-o", tmp_path / "out", "--scheme", "w4g32", "--data", text, "--steps", "4",
             "--batch", "4", "--length", "32", "--set", "model.layers.0.**=w8"]  # fmt: skip
    assert _output.run(cli, [*map(str, words), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["tokens"] == 512
    assert shown["loss_shipped"] == pytest.approx(shown["loss_trained"], abs=0.02)
    assert "w8" in str(spicerack.load(tmp_path / "out").model.layers[0].mlp.up_proj)


def test_zeros_on_the_command_line_count(
    llama_folder: LlamaFolder, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(llama_folder())
    words = ["train", source, "-o", str(tmp_path / "out"), "--data", str(text)]
    words += ["--scheme", "w4g32", "--teacher", source]
    assert _output.run(cli, [*words, "--steps", "0"]) == 2
    assert "steps is 0" in capsys.readouterr().err
    words += ["--steps", "1", "--batch", "2", "--length", "32", "--kl", "0", "--warmup", "0"]
    assert _output.run(cli, words) == 0
    used = json.loads((tmp_path / "out" / "training.json").read_text())["identity"]["settings"]
    assert (used["kl"], used["warmup"]) == (0, 0)


@pytest.mark.parametrize(("words", "match"), [
    (["--scheme", "w4g32"], "either MODEL or --from-scratch"),
    (["{model}", "--kl", "0.3"], "no --teacher|about a teacher"),
    (["{model}", "--set", "x=w8"], "change a scheme"),
    (["{model}", "--scales-only"], "not quantized"),
    (["{model}", "--quantizer", "seq"], "nothing is rounded"),
    (["--from-scratch", "{model}"], "no config.json"),
])  # fmt: skip
def test_options_without_effect_are_refused(
    words: list[str], match: str, llama_folder: LlamaFolder, text: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    import re

    model = str(llama_folder())
    given = [word.format(model=model) for word in words]
    assert _output.run(cli, ["train", *given, "-o", str(tmp_path / "out"), "--data", str(text)]) == 2
    assert re.search(match, capsys.readouterr().err)
