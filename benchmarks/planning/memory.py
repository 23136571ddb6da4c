"""Memory of our own runtime: what `spicerack plan` says beside what a process takes, six kinds of models, two contexts.

    python -m benchmarks.planning.memory [dense mixture ...]

Models are random, of 60 to 260 M parameters in bfloat16, quantized to w8; the planner's constants are fitted to all but
those called other. Each is run in a process of its own, which
imports everything, notes its resident memory, loads the folder, reads a prompt and writes two tokens. Growth is the
peak of resident memory less what was noted; planned are weights, cache and activations, without the libraries.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spicerack.machine.catalogue import find
from spicerack.planning import engine as engines
from spicerack.planning.engine import Request
from spicerack.planning.model import open_model
from spicerack.planning.placement import ALONE, place
from spicerack.planning.precisions import ours

SIZES = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16,
    "num_key_value_heads": 4, "vocab_size": 8192, "max_position_embeddings": 8192, "pad_token_id": 0,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "encoder": ("bert", {"intermediate_size": 4096}),
    "dense": ("llama", {}),
    "mixture": ("qwen3_moe", {"head_dim": 64, "num_experts": 16, "num_experts_per_tok": 4,
                              "moe_intermediate_size": 512}),
    "dense, deep": ("llama", {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 20,
                              "num_key_value_heads": 16}),
    "sliding": ("mistral", {"sliding_window": 256}),
    "MLA": ("deepseek_v3", {"num_key_value_heads": 16, "q_lora_rank": 384, "kv_lora_rank": 256, "qk_rope_head_dim": 32,
                            "qk_nope_head_dim": 64, "v_head_dim": 64, "n_routed_experts": 8, "num_experts_per_tok": 2,
                            "n_group": 1, "topk_group": 1, "moe_intermediate_size": 512, "first_k_dense_replace": 1}),
    "hybrid": ("qwen3_next", {"head_dim": 64, "num_experts": 16, "num_experts_per_tok": 4,
                              "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
                              "linear_num_key_heads": 8, "linear_num_value_heads": 16, "linear_key_head_dim": 64,
                              "linear_value_head_dim": 64}),
    "dense, other": ("llama", {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
                               "num_attention_heads": 12, "num_key_value_heads": 6}),
    "mixture, other": ("qwen3_moe", {"hidden_size": 768, "head_dim": 64, "num_experts": 8, "num_experts_per_tok": 2,
                                     "moe_intermediate_size": 768, "num_hidden_layers": 6}),
    "hybrid, other": ("qwen3_next", {"hidden_size": 768, "head_dim": 64, "num_experts": 8, "num_experts_per_tok": 2,
                                     "moe_intermediate_size": 768, "shared_expert_intermediate_size": 768,
                                     "linear_num_key_heads": 6, "linear_num_value_heads": 12,
                                     "linear_key_head_dim": 64, "linear_value_head_dim": 64}),
}  # fmt: skip
CONTEXTS = (512, 2048)
_RUN = """
import sys, torch, transformers, spicerack
from pathlib import Path
from spicerack.machine.memory import peak_rss_bytes
from spicerack.runtime.load import load
folder, tokens, generates = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "1"
torch.set_num_threads(2)
def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])
before = status("VmRSS")
model = load(folder)
ids = torch.randint(3, 8000, (1, tokens))
with torch.no_grad():
    model.generate(ids, max_new_tokens=2, do_sample=False) if generates else model(ids)
print(status("VmHWM") - before)
"""


def make(kind: str, folder: Path) -> Path:
    """The folder of a model, quantized to w8."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from spicerack import quantize

    family, sizes = MODELS[kind]
    config = CONFIG_MAPPING[family](**{**SIZES, **sizes})
    auto = AutoModel if kind == "encoder" else AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.bfloat16)
    source = folder / kind.replace(", ", "-")
    model.save_pretrained(source)
    quantize(source, "w8", output=f"{source}-w8")
    return source


def main(kinds: Sequence[str]) -> None:
    """Print a row for each model and context. kinds: of models, by their names; none is all."""
    print("| model | context | planned MB | measured MB | planned / measured |\n|---|---|---|---|---|")
    engine = engines.get("spicerack")
    with tempfile.TemporaryDirectory() as temporary:
        for kind in kinds or MODELS:
            source = make(kind, Path(temporary))
            model = open_model(source)
            for context in CONTEXTS:
                placed = place(model, ours("w8"), engine, Request(context), find("desktop"), ALONE)
                (share,) = placed.shares
                planned = sum(term.nbytes for term in share.terms if not term.name.startswith("Python"))
                words = [sys.executable, "-c", _RUN, f"{source}-w8", str(context), str(int(model.generates))]
                out = subprocess.run(words, capture_output=True, text=True, check=False)
                if out.returncode:
                    print(f"| {kind} | {context} | {planned / 1e6:.0f} | {out.stderr.splitlines()[-1][:90]} | |")
                    continue
                measured = json.loads(out.stdout.splitlines()[-1])
                print(
                    f"| {kind} | {context} | {planned / 1e6:.0f} | {measured / 1e6:.0f} | {planned / measured:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main(sys.argv[1:])
