"""This machine as a device: its memory, its cards, and the bandwidth that our kernels measure on it.

Cards are told by what their driver says under /proc, and looked up in the catalogue. A processor's memory is that of
the control group, if it has a limit. To measure takes a fraction of a second, and torch, which is imported for it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from spicerack.errors import UsageError
from spicerack.machine import catalogue
from spicerack.machine.catalogue import GIB, Device
from spicerack.machine.processor import name

_KEPT = 0.1
"""Share of the memory that the system keeps."""
_READ = 512 << 20
"""Bytes that are read to measure bandwidth: more than caches hold."""


def devices() -> tuple[tuple[Device, ...], bool]:
    """What models would run on here, and whether its bandwidth was measured: cards where there are some that are known,
    else the processor."""
    cards = _cards()
    if cards:
        return cards, False
    if sys.platform == "darwin":
        return (_mac(),), False
    return (processor(),), True


def processor() -> Device:
    """The processor and its memory, its bandwidth measured now."""
    from spicerack.kernels.limits import dot_peak, read_bandwidth

    threads = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    memory = memory_bytes() / GIB
    return Device(
        name=f"this machine ({name()}, {threads} cores)", kind="cpu", memory_gib=memory,
        usable_gib=memory * (1 - _KEPT), bandwidth_gb_s=read_bandwidth(_READ, threads) / 1e9,
        int8_tops=dot_peak(threads, seconds=0.1) / 1e12, source="measured now",
    )  # fmt: skip


def memory_bytes() -> int:
    """Bytes of memory of this machine, or of the control group that the process is in, if that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(total, int(text)) if text.isdigit() else total


def _cards() -> tuple[Device, ...]:
    """NVIDIA's, by the names that their driver has; of those that the catalogue does not know, none."""
    cards: list[Device] = []
    for info in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        match = re.search(r"^Model:\s*(.+)$", info.read_text(), re.MULTILINE)
        try:
            cards.extend(catalogue.find(match[1]) if match else ())
        except UsageError:
            continue
    return tuple(cards)


def _mac() -> Device:
    """Apple's chip with the memory that this one has."""
    asked = [
        subprocess.run(["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("machdep.cpu.brand_string", "hw.memsize")
    ]
    gib = int(asked[1]) // GIB
    try:
        return catalogue.find(f"{asked[0]} {gib} GB")[0]
    except UsageError:
        return catalogue.find(f"{gib} GB mac")[0]
