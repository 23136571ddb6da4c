"""GPTQModel: GPTQ at its defaults (group-aware reordering, damping .05), symmetric as by default; computed in float32.

`,asym` has zero points, `,mse` searches the ranges (`mse=2.0`, which its README does not turn on), `,bf16` computes in
bfloat16. What is decoded is the folder that it saves.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with two cores or fewer it takes one, and then asks for two

import exchange
import torch
from gptqmodel import GPTQModel, QuantizeConfig
from safetensors.torch import load_file

_WORD = 32


def codes(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [W, N] -> int64 [32 W / bits, N]: each column is one stream of bits, lowest first."""
    places = torch.arange(_WORD)
    stream = (words.long().unsqueeze(1) >> places.view(1, -1, 1)) & 1
    stream = stream.reshape(-1, bits, words.shape[1])
    return (stream << torch.arange(bits).view(1, -1, 1)).sum(1)


def main() -> None:
    given = exchange.job()
    bits, group, words = given.integers()
    names = given.weights()
    left = {rf"-:.*\.{name.split('.')[-2]}$": {} for name in given.linear() if name not in names}
    # v2 stores zero points as they are; the older layout stores them less one, and loses 0
    config = QuantizeConfig(
        bits=bits, group_size=group, sym="asym" not in words, mse=2.0 if "mse" in words else 0.0, format="gptq_v2",
        device="cpu", dynamic=left or None,
    )  # fmt: skip
    model = GPTQModel.load(str(given.model), config, dtype=torch.bfloat16 if "bf16" in words else torch.float32)
    text = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in given.ids.split(1)]
    begin, used = time.perf_counter(), time.process_time()
    model.quantize(text, batch_size=1)
    seconds, used, peak = time.perf_counter() - begin, time.process_time() - used, exchange.peak_rss_bytes()
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        stored = {k: v for path in Path(folder).rglob("*.safetensors") for k, v in load_file(path).items()}
    decoded = {}
    packed = weights = 0
    types = set()
    for name, weight in names.items():
        at = name.removesuffix("weight")
        parts = [stored[f"{at}{part}"] for part in ("qweight", "qzeros", "scales")]
        packed += sum(part.nbytes for part in parts)
        weights += weight.numel()
        q, zeros, scales = codes(parts[0], bits), codes(parts[1].T.contiguous(), bits).T, parts[2].float()
        types.add(str(parts[2].dtype).removeprefix("torch."))
        groups = stored[f"{at}g_idx"].long()
        decoded[name] = (scales[groups] * (q - zeros[groups, : q.shape[1]])).T  # words hold whole numbers of rows
    exchange.finish(
        given, decoded, "gptqmodel", bits=packed * 8 / weights, seconds=seconds,
        cpu_seconds=round(used, 2), peak_rss_bytes=peak,
        notes=f"{'asymmetric' if 'asym' in words else 'symmetric'}, scales {'/'.join(types)}; bits without g_idx",
    )  # fmt: skip


if __name__ == "__main__":
    main()
