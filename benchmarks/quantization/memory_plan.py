"""Whether the memory that is planned for calibrating is kept: a Llama of given shapes, few blocks, and a hard limit.

The default shapes are Llama-3-70B's, with random bfloat16 weights and a small vocabulary: on two cores about an hour,
and 2 GB of disk a block. The run is a process of its own, in a memory cgroup whose limit is the plan (version 1 or 2,
where one can be made), which kills it if it needs more; pages that are mapped from files can be taken from it and do
not count. Without a cgroup the peak is only told. Prints a line of JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from spicerack.models.bundled import language_model

_ROOT = Path("/sys/fs/cgroup")


def write_model(folder: Path, hidden: int, intermediate: int, heads: int, kv_heads: int, blocks: int) -> None:
    """Block by block would be kinder to memory; few blocks are all that is asked for."""
    tokenizer = AutoTokenizer.from_pretrained(language_model())
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_attention_heads=heads, num_key_value_heads=kv_heads,
        num_hidden_layers=blocks, vocab_size=len(tokenizer), max_position_embeddings=2048, dtype="bfloat16",
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    for path in language_model().glob("*token*.json"):
        shutil.copy(path, folder)


def limited(nbytes: int) -> Path | None:
    """A new memory cgroup, None where none can be made."""
    for folder, knob in ((_ROOT / "memory", "memory.limit_in_bytes"), (_ROOT, "memory.max")):
        group = folder / f"spicerack-{os.getpid()}"
        try:
            group.mkdir()
            (group / knob).write_text(str(nbytes))
        except OSError:
            if group.exists():
                group.rmdir()
            continue
        return group
    return None


def anonymous(pid: int) -> int:
    """Bytes in memory that are no file's."""
    try:
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return 1024 * sum(int(line.split()[1]) for line in status if line.startswith("RssAnon:"))


@click.command()
@click.option("--hidden", default=8192)
@click.option("--intermediate", default=28672)
@click.option("--heads", default=64)
@click.option("--kv-heads", default=8)
@click.option("--blocks", default=1)
@click.option("--scheme", default="w4g128")
@click.option("--method", default="gptq")
@click.option("--samples", default=4)
@click.option("--length", default=512)
@click.option("--calib", type=click.Path(exists=True, path_type=Path), default=language_model() / "calibration.txt")
def main(
    hidden: int, intermediate: int, heads: int, kv_heads: int, blocks: int, scheme: str, method: str, samples: int,
    length: int, calib: Path,
) -> None:  # fmt: skip
    """Plan, limit, run, tell."""
    with TemporaryDirectory() as work:
        source, output = Path(work) / "model", Path(work) / "out"
        write_model(source, hidden, intermediate, heads, kv_heads, blocks)
        command = [
            sys.executable, "-m", "spicerack", "quantize", str(source), "-o", str(output), "--scheme", scheme,
            "--method", method, "--calib", str(calib), "--samples", str(samples), "--length", str(length), "--no-check",
            "--json",
        ]  # fmt: skip
        dry = subprocess.run([*command, "--dry-run"], check=True, capture_output=True, text=True)
        planned = json.loads(dry.stdout)["planned_peak_bytes"]
        group = limited(planned)
        start = time.monotonic()
        enter = f"echo $$ > {group}/cgroup.procs; " if group else ""
        run = subprocess.Popen(["sh", "-c", enter + 'exec "$@"', "sh", *command], stdout=subprocess.PIPE, text=True)
        peak = 0

        def watch() -> None:
            nonlocal peak
            while run.poll() is None:
                peak = max(peak, anonymous(run.pid))
                time.sleep(0.05)

        watcher = threading.Thread(target=watch)
        watcher.start()
        out, _ = run.communicate()
        watcher.join()
        if group:
            group.rmdir()
        result = json.loads(out) if run.returncode == 0 else {}
        print(json.dumps({
            "shapes": [hidden, intermediate, blocks], "scheme": scheme, "method": method, "tokens": samples * length,
            "planned_gb": planned / 1e9, "peak_gb": peak / 1e9, "hard_limit": group is not None,
            "exit": run.returncode, "peak_with_mapped_gb": result.get("peak_rss_bytes", 0) / 1e9,
            "seconds": round(time.monotonic() - start),
        }))  # fmt: skip
        sys.exit(run.returncode)


if __name__ == "__main__":
    main()
