"""Other projects' quantizers beside ours: KL of the project's language model after each, on text held out from all.

All calibrate with the same tokens and are judged by the same function as in quality.py, in float32. Each peer lives in
a virtual environment of its own under --venvs, made when it is not there (1 GB each). What was measured before stays in
results/peers.json until it is measured again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import venv
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import click
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

import spicerack
from spicerack import calibration
from spicerack.calibration import Calibration
from spicerack.demo import language_model
from spicerack.evaluation import measure
from spicerack.evaluation_lm import Comparison

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import machine  # noqa: E402

RESULTS = HERE.parent / "results" / "peers.json"
TORCH = "torch==2.13.0"
THREADS = 2
Row = dict[str, Any]


class Peer(NamedTuple):
    """Pinned packages, specs, and what its processes need in their environment."""

    packages: tuple[str, ...]
    specs: tuple[str, ...]
    environment: dict[str, str] = {}  # noqa: RUF012


PEERS = {
    "kquants": Peer(
        ("xllamacpp==2026.10.11549", "gguf==0.19.0", "transformers==5.24.0", "safetensors==0.8.0"),
        (
            "Q4_0", "IQ4_NL", "IQ4_XS", "Q4_K", "Q3_K", "IQ3_S", "IQ3_XXS", "Q2_K", "IQ2_S", "IQ2_XS",
        ),
    ),
}  # fmt: skip
OURS = {"w4g64": "gptq", "w4g32z": "gptq", "w3g64": "gptq", "w2g32": "gptq", "w2g32h": "gptq"}


def python_of(name: str, venvs: Path) -> Path:
    """The peer's Python, with its packages installed; what they were is noted in the environment."""
    folder = venvs / name
    packages = PEERS[name].packages
    done, wanted = folder / "installed.txt", "\n".join((TORCH, *packages))
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not done.is_file() or done.read_text() != wanted:
        click.echo(f"{name}: installing {', '.join(packages)}", err=True)
        venv.create(folder, with_pip=True, clear=True)
        pip = [python, "-m", "pip", "install", "--quiet"]
        # torch first and alone, so that nothing that depends on it pulls another build
        subprocess.run([*pip, TORCH], check=True)
        subprocess.run([*pip, TORCH, *packages], check=True, env=os.environ | PEERS[name].environment)
        done.write_text(wanted)
    return python


def run(name: str, spec: str, venvs: Path, tokens: Path, output: Path) -> Row:
    """One peer's script -> the line that it prints. Raises CalledProcessError with what it wrote, if it failed."""
    command = [python_of(name, venvs), HERE / f"{name}_peer.py", language_model(), tokens, spec, output]
    limits = {"OMP_NUM_THREADS": str(THREADS), "MKL_NUM_THREADS": str(THREADS), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env=os.environ | limits | PEERS[name].environment,
        cwd=output.parent,
    )  # fmt: skip
    found: Row = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def ours(spec: str, text: Calibration, output: Path) -> Row:
    """The same by this project."""
    method = OURS[spec]
    begin = time.perf_counter()
    made = spicerack.quantize(language_model(), spec, output=output, calibration=text, method=method)
    seconds = time.perf_counter() - begin
    bits = made["bits_per_weight"]
    version = spicerack.__version__
    return {"peer": "spicerack", "version": version, "spec": spec, "bits": bits, "seconds": seconds, "notes": method}


def judged(row: Row, folder: Path, max_tokens: int) -> Row:
    """`row` with the figures of its folder."""
    figures = measure(folder, against=language_model(), max_tokens=max_tokens, dtype=torch.float32).figures
    assert isinstance(figures, Comparison)
    known = figures.as_dict()
    kept = ("tokens", "kl_mean", "kl_mean_ci95", "top1_agreement", "perplexity", "perplexity_reference")
    return row | {key: known[key] for key in kept}


def table(rows: Sequence[Row]) -> str:
    """Markdown, sorted by bits."""
    lines = ["| peer | spec | bits | KL | same top token | seconds |", "|---|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: (-row["bits"], row["kl_mean"])):
        figures = f"{row['bits']:.2f} | {row['kl_mean']:.5f} | {row['top1_agreement']:.1%} | {row['seconds']:.0f}"
        lines.append(f"| {row['peer']} {row['version']} | {row['spec']} | {figures} |")
    return "\n".join(lines)


@click.command(help=__doc__)
@click.option("--venvs", type=click.Path(path_type=Path), required=True, help="Where the peers are installed.")
@click.option("--only", multiple=True, help="PEER:SPEC patterns, such as 'hqq:*' or 'spicerack:w4*'; default: all.")
@click.option("--max-tokens", type=int, default=24_576, show_default=True, help="Of the held-out text.")
@click.option("--samples", type=int, default=128, show_default=True)
@click.option("--length", type=int, default=512, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS, show_default="results/peers.json")
def main(venvs: Path, only: Sequence[str], max_tokens: int, samples: int, length: int, output: Path) -> None:
    torch.set_num_threads(THREADS)
    venvs = venvs.absolute()
    asked = [("spicerack", spec) for spec in OURS] + [(name, spec) for name, peer in PEERS.items() for spec in peer.specs]
    asked = [pair for pair in asked if not only or any(fnmatch(":".join(pair), pattern) for pattern in only)]
    text = calibration.read(
        language_model() / "calibration.txt", AutoTokenizer.from_pretrained(language_model()), samples=samples,
        length=length, seed=0,
    )  # fmt: skip
    result: dict[str, Any] = json.loads(output.read_text()) if output.is_file() else {"rows": []}
    result |= {"machine": machine.describe(THREADS), "calibration_tokens": text.ids.numel()}
    failed = []
    with TemporaryDirectory() as work:
        tokens = Path(work) / "tokens.safetensors"
        save_file({"input_ids": text.ids}, tokens)
        for name, spec in asked:
            folder = Path(work) / f"{name}-{spec}"
            try:
                if name == "spicerack":
                    row = ours(spec, text, folder)
                else:
                    row = run(name, spec, venvs, tokens, folder)
            except subprocess.CalledProcessError as error:
                failed.append(f"{name} {spec}: {(error.stderr or str(error)).strip()[-2000:]}")
                continue
            row = {"by": name} | judged(row, folder, max_tokens)
            click.echo(f"{name} {spec}: KL {row['kl_mean']:.5f}, {row['seconds']:.0f} s", err=True)
            others = [known for known in result["rows"] if (known["by"], known["spec"]) != (name, spec)]
            result["rows"] = [*others, row]
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(result, indent=1) + "\n")
    click.echo(table(result["rows"]))
    for what in failed:
        click.echo(f"\nfailed: {what}", err=True)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
