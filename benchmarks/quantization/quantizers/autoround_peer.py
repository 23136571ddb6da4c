"""AutoRound: its default recipe (200 steps a block, batches of 8), symmetric as by default; computed in float32.

`,asym` has zero points; `,light` is its recipe of 50 steps, on the same text.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import exchange
import torch
from auto_round import AutoRound
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

_BATCH = 8
_PARTS = ("qweight", "qzeros", "scales")


def main() -> None:
    given = exchange.job()
    bits, group, words = given.integers()
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    # with a mask: without, it takes the end tokens in the text for padding
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in given.ids.split(_BATCH)]
    steps, rate = (50, 5e-3) if "light" in words else (200, None)  # None: 1 / steps
    begin = time.perf_counter()
    rounding = AutoRound(
        model, AutoTokenizer.from_pretrained(given.model), bits=bits, group_size=group, sym="asym" not in words,
        iters=steps, lr=rate, nsamples=len(given.ids), seqlen=given.ids.shape[1], batch_size=_BATCH, dataset=batches,
        device_map="cpu", amp=False, enable_torch_compile=False, low_cpu_mem_usage=False,
    )  # fmt: skip
    made, _ = rounding.quantize()
    seconds = time.perf_counter() - begin
    names = given.weights()
    decoded = {name: made.get_parameter(name).detach().float().clone() for name in names}
    with tempfile.TemporaryDirectory() as folder:
        rounding.save_quantized(folder, format="auto_round:auto_gptq")  # its choice for asymmetric 4 bits fails
        stored = {k: v for path in Path(folder).rglob("*.safetensors") for k, v in load_file(path).items()}
    packed = sum(stored[f"{name.removesuffix('.weight')}.{part}"].nbytes for name in names for part in _PARTS)
    weights = sum(weight.numel() for weight in names.values())
    exchange.finish(
        given, decoded, "auto-round", bits=packed * 8 / weights, seconds=seconds,
        notes=f"{'asymmetric' if 'asym' in words else 'symmetric'}, {steps} steps of {_BATCH} sequences, in float32",
    )  # fmt: skip


if __name__ == "__main__":
    main()
