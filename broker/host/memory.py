"""The host's memory, as /proc/meminfo tells it (proc(5))."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True)
class HostMemory:
    """Bytes. ``available``: what programs can get without swapping."""

    total: int
    available: int


def parse(text: str) -> HostMemory:
    """Reads the lines of /proc/meminfo; 0 for what is not told."""
    found = {"MemTotal": 0, "MemAvailable": 0}
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if name in found and words and words[0].isdigit():
            found[name] = int(words[0]) * 1024
    return HostMemory(found["MemTotal"], found["MemAvailable"])


def read() -> HostMemory:
    """As it is now; a file of the kernel's, so it never blocks for long."""
    return parse(MEMINFO.read_text())
