"""The same in transformers' Trainer: prepare the model, give it to the Trainer, freeze it afterwards.

    python examples/qat_trainer.py --out small
    torchrun --nproc-per-node 2 examples/qat_trainer.py --out small          # data-parallel, nothing else changes

`spicerack train` does this with streamed text, exact resuming and a teacher; this file is for those who have a Trainer
already.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer, Trainer, TrainingArguments

import spicerack

ASSETS = Path(__file__).parents[1] / "assets" / "stdlib-lm"


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=ASSETS, help="a decoder's folder")
    parser.add_argument("--text", type=Path, default=ASSETS / "calibration.txt", help="what to train on")
    parser.add_argument("--scheme", default="w4g32")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    return parser.parse_args()


def main() -> None:
    """Train, freeze, save."""
    args = parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids = torch.tensor(tokenizer(args.text.read_text(), add_special_tokens=False, verbose=False).input_ids)
    rows = ids[: len(ids) // args.length * args.length].view(-1, args.length)

    model = spicerack.prepare_qat(spicerack.load(args.model, dtype=torch.float32), args.scheme)
    learned = {id(scale) for scale in spicerack.scales(model)}
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in learned], "weight_decay": 0.01},
        {"params": spicerack.scales(model), "weight_decay": 0.0},  # a scale that decays is a grid that shrinks
    ]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.out) + ".checkpoints", max_steps=args.steps, per_device_train_batch_size=4,
            bf16=True, use_cpu=not torch.cuda.is_available(), logging_steps=10, save_steps=50, save_total_limit=1,
            report_to="none", lr_scheduler_type="cosine", warmup_steps=args.steps // 10,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        optimizers=(torch.optim.AdamW(groups, 1e-4), None),
    )  # fmt: skip
    trainer.train()

    if trainer.is_world_process_zero():
        small = spicerack.freeze(trainer.model.eval())
        spicerack.save(small, args.out)
        tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
