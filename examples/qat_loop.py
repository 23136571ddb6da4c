"""Teach a language model to live with few bits, in a plain PyTorch loop, and ship it bit for bit as it was trained.

    python examples/qat_loop.py --out small                       # a few minutes on two cores
    python examples/qat_loop.py --model MODEL --text text.txt --scheme w3g64 --steps 500 --out small

The loop is the one of any tutorial; what is about few bits are the four lines that begin with `spicerack`. The float
model is the teacher: the loss is how far the rounded one's predictions are from its own.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import AutoTokenizer

import spicerack

ASSETS = Path(__file__).parents[1] / "assets" / "stdlib-lm"


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=ASSETS, help="a decoder's folder")
    parser.add_argument("--text", type=Path, default=ASSETS / "calibration.txt", help="what to train on")
    parser.add_argument("--scheme", default="w2g32h")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4, help="sequences a step")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--rate", type=float, default=5e-4, help="highest learning rate")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    return parser.parse_args()


def main() -> None:
    """Train, freeze, save."""
    args = parse_args()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids = torch.tensor(tokenizer(args.text.read_text(), add_special_tokens=False, verbose=False).input_ids)
    rows = ids[: len(ids) // args.length * args.length].view(-1, args.length)

    teacher = spicerack.load(args.model, dtype=torch.float32)
    student = spicerack.prepare_qat(copy.deepcopy(teacher), args.scheme)
    optimizer = torch.optim.AdamW(student.parameters(), args.rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.rate, total_steps=args.steps, pct_start=0.1)
    student.train()
    for step in range(args.steps):
        batch = rows[torch.randint(len(rows), (args.batch,))]
        with torch.no_grad():
            wanted = teacher(input_ids=batch).logits.flatten(0, 1).log_softmax(-1)
        predicted = student(input_ids=batch).logits.flatten(0, 1).log_softmax(-1)
        loss = F.kl_div(predicted, wanted, reduction="batchmean", log_target=True)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 10 == 0 or step == args.steps - 1:
            print(f"step {step}: KL {loss.item():.4f} nats", flush=True)

    small = spicerack.freeze(student.eval())
    spicerack.save(small, args.out)
    tokenizer.save_pretrained(args.out)
    print(f"{args.out} is ready: spicerack eval {args.out} --against {args.model} --text FILE")


if __name__ == "__main__":
    main()
