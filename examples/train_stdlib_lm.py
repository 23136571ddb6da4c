"""Train a small Llama-style language model on the Python standard library, on a CPU.

    python examples/train_stdlib_lm.py --threads 2 --out assets/stdlib-lm

No download is involved: the corpus is the running Python's own source code (see
``stdlib_corpus.py``), the tokenizer is trained on that corpus, and the model is trained
from a fixed seed.  The hidden matrices are optimized by Muon, embeddings and norms by
AdamW; the learning rate warms up, stays constant, and falls linearly to zero over the
last fifth of the run, which is where the held-out loss settles.

Every few minutes the run writes a checkpoint below ``--work-dir`` and, next to it in
``current/``, the model so far as an ordinary transformers folder.  A run that was killed
continues from its checkpoint when it is started again with the same command.
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import os
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from stdlib_corpus import Corpus, build_corpus, join, sample
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

SEED = 0
EOT, EOT_ID = "<|endoftext|>", 0  # begins every document; special tokens get the first ids
VOCAB_SIZE = 4096
SEQUENCE = 512
BATCH = 16
TOKENS_PER_STEP = BATCH * SEQUENCE

MUON_LR = 5e-3
ADAMW_LR = 3e-3
WEIGHT_DECAY = 0.1
WARMUP_STEPS = 100
DECAY_FRACTION = 0.2
EVAL_EVERY = 50
CALIBRATION_BYTES = 300_000


@dataclass(frozen=True)
class LossPoint:
    """One row of ``loss_curve.csv``; losses are in nats per token."""

    step: int
    tokens: int
    train_loss: float
    heldout_loss: float
    lr: float
    seconds: float


# --- tokenizer and data ---------------------------------------------------------------


def train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE with GPT-2's split pattern; ``EOT`` is never added on its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=EOT,
        eos_token=EOT,
        pad_token=EOT,
        model_max_length=SEQUENCE,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], prefix: str = "") -> list[Tensor]:
    """Token ids of each text, as int16 (the vocabulary has 4096 entries)."""
    encodings = tokenizer.backend_tokenizer.encode_batch_fast([prefix + text for text in texts])
    return [torch.tensor(encoding.ids, dtype=torch.int16) for encoding in encodings]


def batches(library: Sequence[Tensor], tests: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (inputs, targets) batches; the same on every run.

    An epoch is the whole library and every other test file, so that library code is seen
    twice as often as tests.  Its documents are shuffled, packed into one stream without
    padding, and cut into windows, which are shuffled again.
    """
    epoch = 0
    while True:
        rng = torch.Generator().manual_seed(SEED + epoch)
        documents = [*library, *tests[epoch % 2 :: 2]]
        order = torch.randperm(len(documents), generator=rng).tolist()
        stream = torch.cat([documents[i] for i in order]).long()
        count = (len(stream) - 1) // SEQUENCE
        shuffled = torch.randperm(count, generator=rng)
        inputs = stream[: count * SEQUENCE].view(count, SEQUENCE)
        targets = stream[1 : count * SEQUENCE + 1].view(count, SEQUENCE)
        for chosen in shuffled[: count - count % BATCH].view(-1, BATCH):
            yield inputs[chosen], targets[chosen]
        epoch += 1


# --- model and optimization -----------------------------------------------------------


def new_model() -> LlamaForCausalLM:
    """4.5 M parameters; every matrix dimension is a multiple of 256."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=SEQUENCE,
        tie_word_embeddings=True,
        bos_token_id=EOT_ID,
        eos_token_id=EOT_ID,
        pad_token_id=EOT_ID,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=EOT_ID, eos_token_id=EOT_ID, pad_token_id=EOT_ID)  # type: ignore[no-untyped-call]
    return model


def new_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings and norms."""
    hidden = [p for p in model.model.layers.parameters() if p.ndim == 2]
    embedding = [model.get_input_embeddings().weight]
    norms = [p for p in model.parameters() if p.ndim < 2]
    adamw_groups = [{"params": embedding, "weight_decay": WEIGHT_DECAY}, {"params": norms, "weight_decay": 0.0}]
    return [
        torch.optim.Muon(hidden, lr=MUON_LR, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(adamw_groups, lr=ADAMW_LR, betas=(0.9, 0.95)),
    ]


def lr_factor(step: int, total: int) -> float:
    """Warm-up, plateau, linear decay to zero.

    Up to the start of the decay the schedule does not depend on ``total``: a run may be
    stopped there and continued with a shorter or longer plan without losing anything.
    """
    return min((step + 1) / WARMUP_STEPS, 1.0, (total - step) / (total * DECAY_FRACTION))


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy; matrix products in bfloat16, the loss itself in float32."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=inputs, use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


@torch.no_grad()
def evaluate(model: nn.Module, ids: Tensor, stride: int = 1) -> float:
    """Mean loss over every ``stride``-th window of a token stream, windows being independent."""
    count = (len(ids) - 1) // SEQUENCE
    inputs = ids[: count * SEQUENCE].view(count, SEQUENCE)[::stride]
    targets = ids[1 : count * SEQUENCE + 1].view(count, SEQUENCE)[::stride]
    total = 0.0
    for x, y in zip(torch.split(inputs, BATCH), torch.split(targets, BATCH), strict=True):
        total += loss_of(model, x, y).item() * len(x)
    return total / len(inputs)


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    corpus: Corpus,
    heldout: Tensor,
    args: argparse.Namespace,
) -> list[LossPoint]:
    """Run the remaining steps of the plan, and return the loss curve from its beginning."""
    optimizers = new_optimizers(model)
    checkpoint = args.work_dir / "checkpoint.pt"
    step, seconds, train_loss, curve = 0, 0.0, math.nan, list[LossPoint]()
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        torch.set_rng_state(state["rng"])
        step, seconds, train_loss = state["step"], state["seconds"], state["train_loss"]
        curve = [LossPoint(**row) for row in state["curve"]]
        print(f"continuing at step {step}", flush=True)
    base_lrs = [[group["lr"] for group in optimizer.param_groups] for optimizer in new_optimizers(model)]

    library, tests = (
        encode(tokenizer, [str(doc) for doc in part], prefix=EOT) for part in (corpus.library, corpus.tests)
    )
    sizes = {"library": sum(map(len, library)), "tests": sum(map(len, tests)), "held-out": len(heldout)}
    print("tokens:", ", ".join(f"{name} {size:,}" for name, size in sizes.items()), flush=True)

    def save() -> None:
        state: dict[str, Any] = {
            "model": model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "rng": torch.get_rng_state(),
            "step": step,
            "seconds": seconds + time.monotonic() - started,
            "train_loss": train_loss,
            "curve": [asdict(point) for point in curve],
        }
        torch.save(state, checkpoint.with_suffix(".tmp"))
        checkpoint.with_suffix(".tmp").replace(checkpoint)
        save_model(model, tokenizer, args.work_dir / "current")
        write_curve(curve, args.work_dir / "current" / "loss_curve.csv")

    started = last_saved = time.monotonic()
    for inputs, targets in islice(batches(library, tests), step, args.steps):
        factor = lr_factor(step, args.steps)
        for optimizer, lrs in zip(optimizers, base_lrs, strict=True):
            for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr * factor
        loss = loss_of(model, inputs, targets)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        # The reported training loss is a running mean over about 50 steps.
        train_loss = loss.item() if math.isnan(train_loss) else 0.98 * train_loss + 0.02 * loss.item()

        if step % EVAL_EVERY == 0 or step == args.steps:
            elapsed = seconds + time.monotonic() - started
            heldout_loss = evaluate(model, heldout, stride=4)
            curve.append(LossPoint(step, step * TOKENS_PER_STEP, train_loss, heldout_loss, MUON_LR * factor, elapsed))
            print(f"step {step}/{args.steps}  train {train_loss:.4f}  held-out {heldout_loss:.4f}", end="  ")
            print(f"{elapsed:.0f} s", flush=True)
        if step == args.steps or time.monotonic() - last_saved > args.save_every:
            save()
            last_saved = time.monotonic()
    return curve


# --- files ----------------------------------------------------------------------------


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> LlamaForCausalLM:
    """Write a bfloat16 transformers folder, file by file and atomically; return that model."""
    rounded = copy.deepcopy(model).bfloat16()
    fresh = folder.with_name(folder.name + ".tmp")
    rounded.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(fresh.iterdir()):
        path.replace(folder / path.name)
    fresh.rmdir()
    return rounded


def write_curve(curve: Sequence[LossPoint], path: Path) -> None:
    """Write the loss curve as CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([f.name for f in fields(LossPoint)])
        for p in curve:
            losses = (f"{p.train_loss:.4f}", f"{p.heldout_loss:.4f}")
            writer.writerow([p.step, p.tokens, *losses, f"{p.lr:.3g}", f"{p.seconds:.1f}"])


def plot_curve(curve: Sequence[LossPoint], path: Path) -> None:
    """Draw the loss curve (needs matplotlib)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    millions = [point.tokens / 1e6 for point in curve]
    axes.plot(millions, [point.train_loss for point in curve], label="training (running mean)", color="#9aa5b1")
    axes.plot(millions, [point.heldout_loss for point in curve], label="held-out", color="#b3411e")
    axes.set(xlabel="tokens seen (millions)", ylabel="loss (nats per token)", title="stdlib-lm")
    axes.set_ylim(top=5.0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


# --- command line ---------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=2000, help=f"steps of {TOKENS_PER_STEP} tokens (default: 2000)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: all)")
    parser.add_argument("--save-every", type=float, default=180, metavar="SECONDS", help="between checkpoints")
    parser.add_argument("--work-dir", type=Path, default=Path("build/stdlib-lm"), help="checkpoints and interim model")
    parser.add_argument("--out", type=Path, default=Path("assets/stdlib-lm"), help="folder of the finished model")
    return parser.parse_args()


def main() -> None:
    """Build the corpus, train the tokenizer and the model, and write the finished folder."""
    args = parse_args()
    disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    for folder in (args.work_dir, args.out):
        folder.mkdir(parents=True, exist_ok=True)

    corpus = build_corpus()
    heldout_text = join(corpus.heldout)
    calibration_text = join(sample(corpus.library, CALIBRATION_BYTES, SEED))
    (args.out / "heldout.txt").write_text(heldout_text, encoding="utf-8", newline="\n")
    (args.out / "calibration.txt").write_text(calibration_text, encoding="utf-8", newline="\n")

    tokenizer = train_tokenizer(str(doc) for doc in (*corpus.library, *corpus.tests))
    [heldout] = encode(tokenizer, [heldout_text])
    heldout = heldout.long()
    model = new_model()
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {model.num_parameters():,} parameters")

    curve = train(model, tokenizer, corpus, heldout, args)

    rounded = save_model(model, tokenizer, args.out)
    write_curve(curve, args.out / "loss_curve.csv")
    plot_curve(curve, args.out / "loss_curve.png")
    per_token = len(heldout_text.encode()) / len(heldout)
    for name, final in (("float32", model), ("bfloat16", rounded)):
        loss = evaluate(final, heldout)
        bits = loss / math.log(2) / per_token
        print(f"held-out, all windows, {name}: {loss:.4f} nats/token, {bits:.4f} bits/byte")


if __name__ == "__main__":
    main()
