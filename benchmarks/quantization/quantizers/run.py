"""Other projects' quantizers beside ours: KL of the project's language model after each, on text held out from all.

All calibrate with the same tokens and are judged by the same function as in `quality`, in float32. Each peer lives in
a virtual environment of its own under --venvs, made when it is not there (1 GB each). What was measured before stays in
results/peers.json until it is measured again. Another --model is calibrated and judged as there; layers whose
inputs do not divide by the group stay in float, as AutoRound leaves them.
"""

from __future__ import annotations

import json
import os
import subprocess
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
from benchmarks.harness import machine, texts
from spicerack.evaluation.language import compare
from spicerack.models.bundled import language_model
from spicerack.quantization.recipe import skip
from spicerack.runtime.load import load
from spicerack.text.calibration import Calibration
from spicerack.text.windows import windows

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "results" / "peers.json"
TORCH = "torch==2.13.0"
WINDOW = 512
Row = dict[str, Any]


class Peer(NamedTuple):
    """Pinned packages, and specs as its script reads them."""

    packages: tuple[str, ...]
    specs: tuple[str, ...]


PEERS = {
    "hqq": Peer(
        ("hqq==0.2.8.post1", "transformers==5.24.0", "safetensors==0.8.0"),
        tuple(f"{spec}{axis}" for spec in ("w4g64", "w3g64", "w2g32") for axis in ("", ",axis0")),
    ),
    "autoround": Peer(
        ("auto-round==0.16.1", "transformers==5.24.0", "safetensors==0.8.0"),
        tuple(f"{spec}{words}" for words in ("", ",light", ",asym") for spec in ("w2g32", "w4g64", "w3g64")),
    ),
    "gptqmodel": Peer(
        ("gptqmodel==7.6.0",),
        tuple(f"{spec}{words}" for spec in ("w4g64", "w3g64", "w2g32") for words in ("", ",asym", ",asym,mse")),
    ),
    "kquants": Peer(
        ("xllamacpp==2026.10.11549", "gguf==0.19.0", "transformers==5.24.0", "safetensors==0.8.0"),
        (
            "Q4_0", "IQ4_NL", "IQ4_XS", "Q4_K", "Q3_K", "IQ3_S", "IQ3_XXS", "Q2_K", "IQ2_S", "IQ2_XS",
        ),
    ),
}  # fmt: skip
OURS = tuple(
    f"{scheme},{method}"
    for scheme in ("w4g64", "w4g32z", "w3g64", "w2g32", "w2g32h")
    for method in ("gptq", "signround")
)


def python_of(name: str, venvs: Path) -> Path:
    """The peer's Python, with its packages installed; what they were is noted in the environment."""
    folder = venvs / name
    packages = PEERS[name].packages
    done, wanted = folder / "installed.txt", "\n".join((TORCH, *packages))
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not done.is_file() or done.read_text() != wanted:
        click.echo(f"{name}: installing {', '.join(packages)}", err=True)
        venv.create(folder, with_pip=True, clear=True)
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        # torch first and alone, so that nothing that depends on it pulls another build
        subprocess.run([*pip, TORCH], check=True)
        subprocess.run([*pip, TORCH, *packages], check=True)
        done.write_text(wanted)
    return python


def run(name: str, spec: str, model: Path, venvs: Path, tokens: Path, output: Path, threads: int) -> Row:
    """One peer's script -> the line that it prints. Raises CalledProcessError with what it wrote, if it failed."""
    script = HERE / f"{name}_peer.py"
    command = [str(part) for part in (python_of(name, venvs), script, model, tokens, spec, output)]
    # threads that wait give way: on a busy machine they would hold up those they wait for
    limits = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env=os.environ | limits,
        cwd=output.parent,
    )  # fmt: skip
    found: Row = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def ours(spec: str, model: Path, text: Calibration, output: Path, skipped: Sequence[str]) -> Row:
    """The same by this project. spec: SCHEME,METHOD."""
    scheme, _, method = spec.partition(",")
    begin = time.perf_counter()
    made = spicerack.quantize(model, scheme, output=output, calibration=text, method=method, rules=map(skip, skipped))
    seconds = time.perf_counter() - begin
    bits = made["bits_per_weight"]
    version = spicerack.__version__
    return {"peer": "spicerack", "version": version, "spec": spec, "bits": bits, "seconds": seconds, "notes": ""}


def judged(row: Row, folder: Path, model: Path, heldout: Path, max_tokens: int) -> Row:
    """`row` with the figures of its folder: those of `evaluation.measure`, without its noise floor, which is slow."""
    reference, other = (load(where, dtype=torch.float32) for where in (model, folder))
    text = windows(heldout, AutoTokenizer.from_pretrained(model), WINDOW, max_tokens)
    known = compare(reference, other, text).as_dict()
    kept = ("tokens", "kl_mean", "kl_mean_ci95", "top1_agreement", "perplexity", "perplexity_reference")
    return row | {key: known[key] for key in kept}


def table(rows: Sequence[Row]) -> str:
    """Markdown, sorted by bits."""
    lines = ["| peer | spec | bits | KL | same top token | seconds |", "|---|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: (-row["bits"], row["kl_mean"])):
        figures = f"{row['bits']:.2f} | {row['kl_mean']:.5f} | {row['top1_agreement']:.1%} | {row['seconds']:.0f}"
        lines.append(f"| {row['peer']} {row['version']} | {row['spec']} | {figures} |")
    return "\n".join(lines)


def keep(path: Path, about: Row, row: Row) -> None:
    """Put `row` into the file in place of an earlier one of the same peer and spec."""
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    others = [known for known in rows if (known["by"], known["spec"]) != (row["by"], row["spec"])]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(about | {"rows": [*others, row]}, indent=1) + "\n")


@click.command(help=__doc__)
@click.option("--venvs", type=click.Path(path_type=Path), required=True, help="Where the peers are installed.")
@click.option("--model", type=click.Path(path_type=Path), help="A decoder's folder; default: the project's own.")
@click.option("--skip", "skipped", multiple=True, help="Layers that ours leaves in float.")
@click.option("--only", multiple=True, help="PEER:SPEC patterns, such as 'hqq:*', or what is not listed; default: all.")
@click.option("--max-tokens", type=int, default=24_576, show_default=True, help="Of the held-out text.")
@click.option("--samples", type=int, default=128, show_default=True)
@click.option("--length", type=int, default=512, show_default=True)
@click.option("--threads", type=int, default=2, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS, show_default="results/peers.json")
def main(
    venvs: Path,
    model: Path | None,
    skipped: Sequence[str],
    only: Sequence[str],
    max_tokens: int,
    samples: int,
    length: int,
    threads: int,
    output: Path,
) -> None:
    torch.set_num_threads(threads)
    venvs, model = venvs.absolute(), (model or language_model()).absolute()
    known = {"spicerack": OURS} | {name: peer.specs for name, peer in PEERS.items()}
    listed = [f"{name}:{spec}" for name, specs in known.items() for spec in specs]
    wanted = [[pair for pair in listed if fnmatch(pair, pattern)] or [pattern] for pattern in only] or [listed]
    asked = dict.fromkeys(pair for some in wanted for pair in some)
    failed = []
    with TemporaryDirectory() as work:
        text, heldout = texts.of_decoder(model, Path(work), samples, length)
        about = {"machine": machine.describe(threads), "calibration_tokens": text.ids.numel()}
        tokens = Path(work) / "tokens.safetensors"
        save_file({"input_ids": text.ids}, tokens)
        for pair in asked:
            name, _, spec = pair.partition(":")
            folder = Path(work) / f"{name}-{spec}"
            try:
                if name == "spicerack":
                    row = ours(spec, model, text, folder, skipped)
                else:
                    row = run(name, spec, model, venvs, tokens, folder, threads)
            except subprocess.CalledProcessError as error:
                failed.append(f"{name} {spec}: {(error.stderr or str(error)).strip()[-2000:]}")
                continue
            row = {"by": name, "cpu": about["machine"]["cpu"]} | judged(row, folder, model, heldout, max_tokens)
            click.echo(f"{name} {spec}: KL {row['kl_mean']:.5f}, {row['seconds']:.0f} s", err=True)
            keep(output, about, row)
    if output.is_file():
        click.echo(table(json.loads(output.read_text())["rows"]))
    for what in failed:
        click.echo(f"\nfailed: {what}", err=True)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
