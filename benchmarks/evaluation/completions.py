"""Does a quantized language model still write Python: the share of lines of sampled completions that `tokenize` takes.

64 completions of 96 tokens (temperature 0.8, the same seeds for each model) behind openings of the held-out files; each
line that is not empty is tokenized by itself, a bracket or docstring that stays open is no fault. Beside the float
model's share, because it writes prose in docstrings, too.
"""

from __future__ import annotations

import io
import tokenize
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import spicerack
from spicerack.models.bundled import language_model
from spicerack.text import calibration

COUNT, NEW, OPENING = 64, 96, 48


@click.command(help=__doc__)
@click.option("--scheme", "schemes", multiple=True, default=("w2g32", "w2g32h", "w4g64"), show_default=True)
@click.option("--method", default="gptq", show_default=True)
def main(schemes: Sequence[str], method: str) -> None:
    folder = language_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = calibration.read(folder / "calibration.txt", tokenizer, samples=128, length=512, seed=0)
    click.echo("| model | lines | taken by tokenize |\n|---|---|---|")
    _report("float", spicerack.load(folder, dtype=torch.float32), tokenizer)
    for scheme in schemes:
        with TemporaryDirectory() as work:
            spicerack.quantize(folder, scheme, output=Path(work) / "out", method=method, calibration=text)
            _report(f"{scheme} {method}", spicerack.load(Path(work) / "out", dtype=torch.float32), tokenizer)


@torch.no_grad()
def _report(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    ids = torch.tensor(tokenizer((language_model() / "heldout.txt").read_text(encoding="utf-8")).input_ids)
    starts = torch.arange(COUNT) * ((len(ids) - OPENING) // COUNT)
    torch.manual_seed(0)
    made = model.generate(
        torch.stack([ids[start : start + OPENING] for start in starts]),
        do_sample=True, temperature=0.8, top_k=0, max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=0,
    )  # fmt: skip
    texts = tokenizer.batch_decode(made[:, OPENING:], skip_special_tokens=True)
    lines = [line for text in texts for line in text.split("\n")[1:-1] if line.strip()]  # whole lines only
    good = sum(map(_taken, lines))
    click.echo(f"| {name} | {len(lines)} | {good / len(lines):.1%} |")


def _taken(line: str) -> bool:
    try:
        kinds = [token.type for token in tokenize.generate_tokens(io.StringIO(line.strip() + "\n").readline)]
    except tokenize.TokenError:  # a bracket or a docstring that is closed on another line
        return True
    return tokenize.ERRORTOKEN not in kinds


if __name__ == "__main__":
    main()
