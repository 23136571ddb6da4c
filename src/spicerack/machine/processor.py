"""What the processor calls itself, for people and for records of what was measured on it."""

from __future__ import annotations

import platform
import re
from pathlib import Path


def name() -> str:
    """As the system calls it: "AMD EPYC 9654 96-Core Processor"; of systems that say nothing, the kind of machine."""
    info = Path("/proc/cpuinfo")
    match = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.is_file() else None
    return match[1] if match else platform.processor() or platform.machine()
