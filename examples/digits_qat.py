"""Train a small convolutional network on scikit-learn's digits, then in 2 bits, five-fold cross-validated.

    python examples/digits_qat.py              # a minute on one core at most
    python examples/digits_qat.py --out digits # also writes the last fold's network and loads it again

Per fold: a float network; the same rounded to nearest; the same trained on for some epochs in 2 bits, frozen, with its
batch normalisation folded into the scales.
"""

from __future__ import annotations

import argparse
import copy
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold
from torch import Tensor, nn
from torch.nn import functional as F

import spicerack

BATCH = 64


@dataclass(frozen=True)
class Score:
    """Share of right answers, and mean loss in nats."""

    accuracy: float
    loss: float


def network() -> nn.Sequential:
    """Two convolutions and a linear layer for pictures of 8 x 8."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 16, 10),
    )  # fmt: skip


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int, rate: float) -> None:
    """Adam, one cycle from `rate` down to 0."""
    optimizer = torch.optim.Adam(model.parameters(), rate)
    steps = epochs * (len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(x))
        for some in order[: len(x) // BATCH * BATCH].view(-1, BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(x[some]), y[some]).backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def score(model: nn.Module, x: Tensor, y: Tensor) -> Score:
    """In eval mode."""
    out = model(x)
    return Score(float((out.argmax(1) == y).float().mean()), float(F.cross_entropy(out, y)))


def one_fold(
    scheme: str, x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor, epochs: int, more: int
) -> tuple[dict[str, Score], nn.Module]:
    """Scores of the three networks, and the frozen one."""
    model = network()
    train(model, x, y, epochs, 3e-3)
    student = spicerack.prepare_qat(copy.deepcopy(model), scheme).eval()
    scores = {"float": score(model, x_test, y_test), "rounded": score(student, x_test, y_test)}
    train(student, x, y, more, 1e-3)
    small = spicerack.fold_batchnorm(spicerack.freeze(student, compute="float"))
    scores["trained"] = score(small, x_test, y_test)
    return scores, small


def cross_validated(scheme: str, folds: int, epochs: int, more: int) -> tuple[list[dict[str, Score]], nn.Module]:
    """Scores of each fold, and the last frozen network."""
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(digits.target)
    scores = []
    for train_rows, test_rows in StratifiedKFold(folds, shuffle=True, random_state=0).split(digits.data, digits.target):
        torch.manual_seed(0)
        result, small = one_fold(scheme, x[train_rows], y[train_rows], x[test_rows], y[test_rows], epochs, more)
        scores.append(result)
    return scores, small


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scheme", default="w2", help="of all layers (default: w2)")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=15, help="of the float network")
    parser.add_argument("--more", type=int, default=10, help="of the one in few bits")
    parser.add_argument("--out", type=Path, help="folder for the last fold's network")
    args = parser.parse_args()
    torch.set_num_threads(1)
    scores, small = cross_validated(args.scheme, args.folds, args.epochs, args.more)
    print(f"{args.scheme}, {args.folds} folds: mean (standard error)")
    for name in scores[0]:
        accuracy = torch.tensor([fold[name].accuracy for fold in scores]).double()
        loss = torch.tensor([fold[name].loss for fold in scores]).double()
        error = accuracy.std() / math.sqrt(len(scores))
        print(f"  {name:8s} right {100 * accuracy.mean():6.2f} % ({100 * error:.2f})   loss {loss.mean():.4f} nats")
    if args.out:
        spicerack.save(small, args.out)
        again = spicerack.load(args.out, into=spicerack.fold_batchnorm(network().eval()), compute="float")
        x = torch.rand(5, 1, 8, 8)
        assert torch.equal(again(x), small(x))
        print(f"{args.out}: {sum(f.stat().st_size for f in args.out.glob('*.safetensors'))} bytes")


if __name__ == "__main__":
    main()
