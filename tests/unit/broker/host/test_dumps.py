from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import ctypes, resource, subprocess, sys
from broker.host.dumps import forbid_dumps
forbid_dumps()
print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0), *resource.getrlimit(resource.RLIMIT_CORE))
subprocess.run([sys.executable, "-c", "import ctypes; print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))"], check=True)
"""


def test_a_process_is_not_dumped_and_its_children_are_as_they_were() -> None:
    done = subprocess.run([sys.executable, "-u", "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.split("\n")[:2] == ["0 0 0", "1"]
