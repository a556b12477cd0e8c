"""Processes as /proc and pidfds show them.

A pid alone names nobody for long; a pid with its start time and the boot id names one process for
ever (proc(5): ``starttime``, ``/proc/sys/kernel/random/boot_id``).
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

STOPPED = frozenset("TtZX")
"""States of a process that the scheduler leaves alone."""


@dataclass(frozen=True)
class Process:
    """``start``: clock ticks from boot to its start."""

    pid: int
    start: int


def boot_id() -> str:
    """Changes with every boot of the machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third on; empty when it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return []
    return text.rpartition(")")[2].split()


def identify(pid: int) -> Process | None:
    """The process that has ``pid`` now."""
    fields = _stat(pid)
    return Process(pid, int(fields[19])) if fields else None


def parent(pid: int) -> int:
    """Its parent's pid, 0 when it is gone."""
    fields = _stat(pid)
    return int(fields[1]) if fields else 0


def children(pid: int) -> list[int]:
    """Pids of its children, of all its threads."""
    found: list[int] = []
    with suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with suppress(OSError):
                found += [int(word) for word in Path(f"/proc/{pid}/task/{task}/children").read_text().split()]
    return found


def tree(pid: int) -> list[int]:
    """``pid`` and all that descend from it, parents first."""
    pids = [pid]
    for each in pids:
        pids += children(each)
    return pids


def memory(pid: int) -> int:
    """Bytes that ``pid`` and its descendants take; shared pages count in part (PSS, proc(5)). Blocks."""
    total = 0
    for each in tree(pid):
        with suppress(OSError):
            for line in Path(f"/proc/{each}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
    return total


def open_pidfd(process: Process) -> int | None:
    """A pidfd of exactly that process, None when it has ended and is reaped."""
    try:
        fd = os.pidfd_open(process.pid)
    except OSError:
        return None
    if identify(process.pid) != process:
        os.close(fd)
        return None
    return fd


def ready(fds: Sequence[int], timeout_s: float) -> list[int]:
    """Which of ``fds`` can be read, or are at their end; blocks until one is or the time is over."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return [fd for fd, _ in poll.poll(timeout_s * 1000)]


def ended(pidfd: int) -> bool:
    """Whether the process of ``pidfd`` has ended (it may be a zombie yet)."""
    return bool(ready([pidfd], 0))


def reap(pidfd: int) -> int | None:
    """The exit code of an ended child (128 + signal number when killed); None when it is not our child."""
    try:
        result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    except ChildProcessError:
        return None
    if result is None:
        return None
    return result.si_status if result.si_code == os.CLD_EXITED else 128 + result.si_status


def send(pids: Sequence[int], number: signal.Signals) -> None:
    """Sends a signal to each that still lives."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def kill(processes: Iterable[Process], timeout_s: float) -> None:
    """SIGKILL to each, then waits until they are dead. Blocks, ``timeout_s`` at most."""
    deadline = time.monotonic() + timeout_s
    fds = [fd for fd in map(open_pidfd, processes) if fd is not None]
    for fd in fds:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(fd, signal.SIGKILL)
    for fd in fds:
        ready([fd], max(0.0, deadline - time.monotonic()))
        os.close(fd)


def freeze(pid: int, timeout_s: float) -> bool:
    """Stops ``pid`` and its descendants; False when some ran on after ``timeout_s``. Blocks.

    A process may fork before its signal arrives, hence the rounds; nobody tells us of a stop that
    is not our child's, hence the pause between them.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        running = [each for each in tree(pid) if (_stat(each) or "Z")[0] not in STOPPED]
        if not running:
            return True
        if time.monotonic() > deadline:
            return False
        send(running, signal.SIGSTOP)
        time.sleep(0.001)


def thaw(pid: int) -> None:
    """Undoes ``freeze``."""
    send(tree(pid), signal.SIGCONT)


def find(argv: Sequence[str]) -> list[int]:
    """Pids whose command line begins with ``argv``."""
    wanted = b"".join(word.encode() + b"\0" for word in argv)
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with suppress(OSError):
                if Path(f"/proc/{name}/cmdline").read_bytes().startswith(wanted):
                    found.append(int(name))
    return found
