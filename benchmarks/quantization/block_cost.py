"""What GPTQ of one block of Llama-7B's shape costs, ours and GPTQModel's: time and peak memory, in turns.

Hidden 4096, MLP 11008, 32 heads, random bfloat16 weights, written as a model of one block with the vocabulary of the
project's language model, whose calibration text both are given, tokenized once. Each run is a process of its own.
GPTQModel's seconds are those of its `quantize`, without loading and saving; ours are of the whole call, from folder to
folder. GPTQModel works in float32 as ours does, and in bfloat16 with `,bf16`. Seconds of the processor, all threads
together, hardly depend on what else the machine does. Memory is the peak of the resident set until then. Prints a
Markdown table. About twenty minutes on two cores, and 1 GB in a temporary folder.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.harness import machine
from benchmarks.quantization.quantizers.run import python_of
from spicerack.models.bundled import language_model
from spicerack.text import calibration

HERE = Path(__file__).parent / "quantizers"

OURS = "spicerack"
PEERS = ("gptqmodel", "gptqmodel,bf16")


def write_model(folder: Path) -> None:
    """One block of Llama-7B with random weights, in bfloat16, and a tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(language_model())
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_key_value_heads=32, num_hidden_layers=1,
        vocab_size=len(tokenizer), max_position_embeddings=2048, dtype="bfloat16",
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    for path in language_model().glob("*token*.json"):
        shutil.copy(path, folder)


def turn(who: str, scheme: str, work: Path, venvs: Path, threads: int) -> dict[str, Any]:
    """One process -> the line that it prints."""
    name, _, word = who.partition(",")
    python = Path(sys.executable) if who == OURS else python_of(name, venvs)
    script, spec = HERE / f"{name}_peer.py", ",".join(filter(None, (scheme, word)))
    command = [str(part) for part in (python, script, work / "model", work / "tokens.safetensors", spec, work / "out")]
    limits = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive", "CUDA_VISIBLE_DEVICES": ""}
    try:
        done = subprocess.run(
            command, check=True, capture_output=True, text=True, env=os.environ | limits, cwd=work
        )  # fmt: skip
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"{who}: {error.stderr.strip()[-2000:]}") from error
    finally:
        shutil.rmtree(work / "out", ignore_errors=True)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    memory = f"{found['peak_rss_bytes'] / 1e9:.1f} GB"
    click.echo(f"{who}: {found['seconds']:.0f} s, {found['cpu_seconds']:.0f} s of processor, {memory}", err=True)
    return found


@click.command(help=__doc__)
@click.option("--venvs", type=click.Path(path_type=Path), required=True, help="Where the peers are installed.")
@click.option("--only", multiple=True, type=click.Choice([OURS, *PEERS]), help="Default: all.")
@click.option("--scheme", default="w4g128", show_default=True)
@click.option("--samples", type=int, default=4, show_default=True)
@click.option("--length", type=int, default=2048, show_default=True)
@click.option("--rounds", type=int, default=3, show_default=True, help="Turns of each; medians are reported.")
@click.option("--threads", type=int, default=2, show_default=True)
def main(venvs: Path, only: Sequence[str], scheme: str, samples: int, length: int, rounds: int, threads: int) -> None:
    names = tuple(only) or (OURS, *PEERS)
    taken: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with TemporaryDirectory() as place:
        work = Path(place)
        write_model(work / "model")
        text = calibration.read(
            language_model() / "calibration.txt", AutoTokenizer.from_pretrained(language_model()), samples=samples,
            length=length, seed=0,
        )  # fmt: skip
        save_file({"input_ids": text.ids}, work / "tokens.safetensors")
        for _ in range(rounds):
            for name in names:
                taken[name].append(turn(name, scheme, work, venvs.absolute(), threads))
    about = machine.describe(threads)
    click.echo(f"\n{about['cpu']}, {threads} threads; {scheme}, {text.ids.numel()} tokens, {rounds} rounds.\n")
    click.echo("| who | seconds | spread | processor seconds | spread | of the first | peak memory, GB |")
    click.echo("|---|---|---|---|---|---|---|")
    first = median(run["cpu_seconds"] for run in taken[names[0]])
    for name, runs in taken.items():
        wall, used = ([run[key] for run in runs] for key in ("seconds", "cpu_seconds"))
        peak = median(run["peak_rss_bytes"] for run in runs) / 1e9
        figures = " | ".join(f"{median(x):.0f} | {min(x):.0f} to {max(x):.0f}" for x in (wall, used))
        click.echo(f"| {name} {runs[0]['version']} | {figures} | {median(used) / first:.2f} | {peak:.1f} |")


if __name__ == "__main__":
    main()
