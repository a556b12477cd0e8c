"""Starts one sandbox process and finds one again. Blocks for some milliseconds: for a worker thread.

Output and bubblewrap's status go through named pipes that the sandbox's side holds open for
reading as well: a broker that is gone breaks no pipe, and the next broker reads on.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from broker.errors import Code, CortexError
from broker.sandbox import procfs
from broker.sandbox.process_records import Record, Records

SPAWN_TIMEOUT_S = 10.0
TAIL_BYTES = 4096


@dataclass
class Handles:
    """Open descriptors of one running sandbox: pidfds and the reading ends of its pipes."""

    init: int
    monitor: int | None
    out: int | None
    status: int | None

    def close(self) -> None:
        """Closes all. Idempotent."""
        for fd in (self.init, self.monitor, self.out, self.status):
            if fd is not None and fd >= 0:
                os.close(fd)
        self.init, self.monitor, self.out, self.status = -1, None, None, None


def _reader(path: Path) -> int | None:
    with suppress(OSError):
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    return None


def _pipe(path: Path, opened: list[int]) -> tuple[int, int]:
    """A new named pipe: (our end, the sandbox's end), both added to ``opened``. The sandbox never blocks on a
    full one."""
    with suppress(FileNotFoundError):
        path.unlink()
    os.mkfifo(path, 0o600)
    for flags in (os.O_RDONLY, os.O_RDWR):
        opened.append(os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC))
    return opened[-2], opened[-1]


def command(record: Record, status_fd: int | None) -> list[str]:
    """The argv to execute; the status descriptor's number goes in before ``--``."""
    if status_fd is None:
        return list(record.argv)
    split = record.argv.index("--")
    return [*record.argv[:split], "--json-status-fd", str(status_fd), *record.argv[split:]]


def launcher() -> list[str]:
    """Goes before bubblewrap, which refuses capabilities in a user that is not root; a service's broker has some."""
    if os.getuid() != 0 and _has_capabilities():
        return ["/usr/bin/setpriv", "--ambient-caps=-all", "--inh-caps=-all"]
    return []


def _has_capabilities() -> bool:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapPrm:"):
            return int(line.split()[1], 16) != 0
    return False


def spawn(record: Record, records: Records) -> tuple[Record, Handles]:
    """Starts it; the record is on disk before it runs and names its process when this returns.

    Raises ``CortexError`` when it cannot be started.
    """
    records.save(replace(record, stage="starting", boot=procfs.boot_id(), init=None, monitor=None, code=None))
    opened: list[int] = []
    try:
        out, theirs_out = _pipe(records.fifo(record.ref, "out"), opened)
        status, theirs = _pipe(records.fifo(record.ref, "status"), opened) if record.isolated else (None, None)
        child = subprocess.Popen(
            (launcher() if record.isolated else []) + command(record, theirs),
            stdin=subprocess.DEVNULL,
            stdout=theirs_out,
            stderr=theirs_out,
            env=record.env,
            cwd="/",
            pass_fds=() if theirs is None else (theirs,),
            start_new_session=True,
            umask=0o022,
        )
    except OSError as error:
        for fd in opened:
            os.close(fd)
        raise _cannot(record, error) from error
    for fd in opened:
        if fd not in (out, status):
            os.close(fd)
    child.returncode = 0  # it outlives us on purpose; its end is seen by pidfd
    return _settle(record, records, child.pid, out, status)


def _cannot(record: Record, error: OSError) -> CortexError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CortexError(
            Code.DISK_FULL, f"cannot start sandbox {record.ref}", cause=error, hint="Make room under state_dir."
        )
    return CortexError(
        Code.ENGINE_ERROR,
        f"cannot execute {record.argv[0]}",
        cause=error,
        hint="Install bubblewrap, or mend the Python that runs the broker.",
    )


def _settle(record: Record, records: Records, pid: int, out: int, status: int | None) -> tuple[Record, Handles]:
    monitor = procfs.identify(pid)
    monitor_fd = os.pidfd_open(pid)
    handles = Handles(-1, monitor_fd, out, status)
    init = monitor if status is None else _init_of(status, monitor_fd)
    init_fd = None if init is None else procfs.open_pidfd(init)
    if init is None or init_fd is None:
        _end(pid, monitor_fd)
        words = read_tail(out, b"").decode(errors="replace").strip()
        handles.close()
        raise CortexError(
            Code.ISOLATION_MISSING if record.isolated else Code.SANDBOX_DIED,
            "the sandbox process did not start",
            cause=words or "no word from it",
            hint="`cortex doctor` tries bubblewrap; the cause is its own words.",
        )
    handles.init = init_fd
    record = replace(record, stage="running", boot=procfs.boot_id(), init=init, monitor=monitor, code=None)
    try:
        records.save(record)
    except CortexError:
        # Nobody would know of it, and take its slot for free while it runs on in there.
        _end(pid, monitor_fd)
        handles.close()
        raise
    return record, handles


def _end(pid: int, monitor_fd: int) -> None:
    """Kills what was started, all of it, and returns when it is dead."""
    processes = [process for each in procfs.tree(pid) if (process := procfs.identify(each)) is not None]
    procfs.kill(processes, SPAWN_TIMEOUT_S)
    procfs.ready([monitor_fd], SPAWN_TIMEOUT_S)
    procfs.reap(monitor_fd)


def _init_of(status: int, monitor_fd: int) -> procfs.Process | None:
    """The namespace's init, as bubblewrap says as soon as it is made (``child-pid``)."""
    deadline = time.monotonic() + SPAWN_TIMEOUT_S
    data = b""
    while b"\n" not in data:
        ready = procfs.ready([status, monitor_fd], max(0.0, deadline - time.monotonic()))
        if status in ready:
            chunk = _read(status)
            if not chunk:
                return None
            data += chunk
        elif monitor_fd in ready or not ready:
            return None
    pid = _field(data, "child-pid")
    return None if pid is None else procfs.identify(pid)


def last_code(handles: Handles, timeout_s: float) -> int | None:
    """The exit code of a sandbox whose init has ended, and reaps what is ours to reap. Blocks until then."""
    code = None
    if handles.monitor is not None:
        procfs.ready([handles.monitor], timeout_s)
        code = procfs.reap(handles.monitor)
    return code if handles.status is None else _field(_read(handles.status), "exit-code")


def _field(data: bytes, key: str) -> int | None:
    for line in data.splitlines():
        with suppress(ValueError):
            told = json.loads(line)
            if isinstance(told, dict) and isinstance(told.get(key), int):
                return int(told[key])
    return None


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, 65536)
    except BlockingIOError:
        return b""


def read_tail(fd: int, tail: bytes) -> bytes:
    """``tail`` and what waits in the pipe, the last ``TAIL_BYTES`` of both."""
    return (tail + _read(fd))[-TAIL_BYTES:]


def adopt(record: Record, records: Records) -> tuple[Record, Handles | None]:
    """Finds the sandbox of a record from an earlier broker; without handles when it has ended."""
    if record.stage in ("created", "exited"):
        return record, None
    if record.boot != procfs.boot_id():
        return replace(record, stage="exited"), None
    if record.init is None:
        record = _search(record)
    init = None if record.init is None else procfs.open_pidfd(record.init)
    if init is None:
        return replace(record, stage="exited"), None
    monitor = None if record.monitor is None else procfs.open_pidfd(record.monitor)
    out = _reader(records.fifo(record.ref, "out"))
    status = _reader(records.fifo(record.ref, "status")) if record.isolated else None
    return record, Handles(init, monitor, out, status)


def _search(record: Record) -> Record:
    """The broker died between starting it and noting its pid: known by its command line."""
    start = record.argv[: record.argv.index("--")] if record.isolated else record.argv
    pids = procfs.find(start)
    if record.isolated:
        # Bubblewrap outside, its init, and perhaps a child that has not yet executed the command.
        outside = [pid for pid in pids if procfs.parent(pid) not in pids]
        pids = [pid for pid in pids if procfs.parent(pid) in outside]
    if not pids:
        return record
    init = procfs.identify(pids[0])
    monitor = procfs.identify(procfs.parent(pids[0])) if record.isolated else init
    return replace(record, stage="running", init=init, monitor=monitor)
