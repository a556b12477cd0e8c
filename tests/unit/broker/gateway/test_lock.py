"""The lock of the one gateway."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from broker.gateway import lock

HOLD = (
    "import sys; from pathlib import Path; from broker.gateway import lock\n"
    "print(lock.take(Path(sys.argv[1])) is not None, flush=True); sys.stdin.read()"
)


def test_one_at_a_time_and_the_kernel_says_who(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert lock.holder(path) is None
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"True\n"
        assert lock.take(path) is None
        assert lock.holder(path) == process.pid
        found = lock.holder_pidfd(path)
        assert found is not None
        assert found[0] == process.pid
        os.close(found[1])
        process.kill()
    assert lock.holder(path) is None
    fd = lock.take(path)
    assert fd is not None
    os.close(fd)
