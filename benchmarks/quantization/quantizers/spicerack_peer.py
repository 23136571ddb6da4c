"""Ours, with GPTQ, called as the peers are: for what it costs (`block_cost`). It leaves its own kind of folder."""

from __future__ import annotations

import time

import exchange
import torch

import spicerack
from spicerack.text.calibration import Calibration


def main() -> None:
    given = exchange.job()
    text = Calibration(given.ids, None, "", 0.0, "tokens")
    begin, used = time.perf_counter(), time.process_time()
    made = spicerack.quantize(
        given.model, given.spec, output=given.output, calibration=text, method="gptq", threads=torch.get_num_threads()
    )
    seconds, used = time.perf_counter() - begin, time.process_time() - used
    exchange.tell(
        given, "spicerack", bits=made["bits_per_weight"], seconds=seconds, notes="gptq", cpu_seconds=round(used, 2),
        peak_rss_bytes=made["peak_rss_bytes"],
    )  # fmt: skip


if __name__ == "__main__":
    main()
