from __future__ import annotations

import os
import subprocess
import sys

from sandbox_agent import memory

PROBE = """
import ctypes, os
from sandbox_agent import memory
meter = memory.open_meter()
ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)
os.setgroups([]); os.setgid(64321); os.setuid(64321)
before = memory.pss(meter)
held = bytearray(32 * 2**20)
print(before, memory.pss(meter))
"""


def test_an_undumpable_process_of_another_user_still_reads_its_own_memory() -> None:
    probe = PROBE if os.geteuid() == 0 else PROBE.replace("os.setgroups([]); ", "pass\n#")
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=30, check=True)
    before, after = (int(word) for word in done.stdout.split())
    assert before > 2**20
    assert after - before > 30 * 2**20


def test_no_meter_reads_as_zero() -> None:
    assert memory.pss(-1) == 0
