"""What every benchmark shares: child processes, their CPU time, interleaved rounds, tables, JSON.

A target is a figure with a limit; ``report`` prints all of them and gives the exit status.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

READY = "ready"

"""A peer's first line on stdout, once it serves."""
START_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Target:
    """A figure that is asked for: ``ok`` when ``value`` is at most ``limit``, or at least where ``least``."""

    name: str
    unit: str
    value: float
    limit: float
    ok: bool
    least: bool = False


def target(name: str, unit: str, value: float, limit: float) -> Target:
    return Target(name, unit, round(value, 4), limit, value <= limit)


def target_least(name: str, unit: str, value: float, limit: float) -> Target:
    """``value`` has to be ``limit`` or more."""
    return Target(name, unit, round(value, 4), limit, value >= limit, least=True)


@dataclass
class Report:
    """One benchmark's result. ``rows`` by table title: lists of cells, the first row being the head."""

    name: str
    tables: dict[str, list[list[str]]] = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def finish(self, path: str | None) -> int:
        """Prints the tables, writes JSON to ``path`` ("-": stdout); 1 when a target is missed."""
        out = sys.stderr if path == "-" else sys.stdout
        for title, rows in self.tables.items():
            print(f"\n{title}\n{table(rows)}", file=out)
        verdicts = [
            [t.name, f"{t.value:g} {t.unit}", f"{'≥' if t.least else '≤'} {t.limit:g}", "ok" if t.ok else "MISSED"]
            for t in self.targets
        ]
        if verdicts:
            print(f"\nTargets\n{table([['target', 'value', 'limit', ''], *verdicts])}", file=out)
        for note in self.notes:
            print(note, file=out)
        if path:
            text = json.dumps(self.as_json(), indent=2)
            if path == "-":
                print(text)
            else:
                Path(path).write_text(text + "\n")
        return 0 if all(t.ok for t in self.targets) else 1

    def as_json(self) -> dict[str, Any]:
        return {
            "benchmark": self.name,
            "machine": machine(),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "targets": [asdict(t) for t in self.targets],
            "figures": self.figures,
            "tables": self.tables,
            "notes": self.notes,
        }


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    model = ""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    system = os.uname()
    python = sys.version.split()[0]
    return {"cpus": os.cpu_count(), "model": model, "kernel": system.release, "python": python}


def table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns; the first row is the head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and all its threads so far, children not counted."""
    # The kernel's number for the CPU clock of another process (clock_getcpuclockid(3)).
    return time.clock_gettime((~pid << 3) | 2)


def cpu_of(pids: Sequence[int]) -> float:
    return sum(cpu_seconds(pid) for pid in pids)


def pss_bytes(pid: int) -> int:
    """Proportional memory of a process."""
    with open(f"/proc/{pid}/smaps_rollup") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def percentile(values: Sequence[float], share: float) -> float:
    """``share`` from 0 to 1; the nearest value."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def interleaved(
    names: Sequence[str], rounds: int, run: Callable[[str], dict[str, float]]
) -> dict[str, dict[str, list[float]]]:
    """Runs each name once a round, in turning order; by name and figure the list of what was measured."""
    seen: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    for number in range(rounds):
        for name in [*names[number % len(names) :], *names[: number % len(names)]]:
            for figure, value in run(name).items():
                seen[name].setdefault(figure, []).append(value)
    return seen


def medians(seen: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, dict[str, float]]:
    return {name: {figure: median(values) for figure, values in figures.items()} for name, figures in seen.items()}


def histogram(text: str, name: str) -> dict[float, float]:
    """A Prometheus histogram without labels, out of the exposition text: observations up to each bound."""
    start = f'{name}_bucket{{le="'
    lines = [line.removeprefix(start).partition('"} ') for line in text.splitlines() if line.startswith(start)]
    return {float(bound): float(count) for bound, _, count in lines}


def difference(after: Mapping[float, float], before: Mapping[float, float]) -> dict[float, float]:
    """What a histogram observed in between."""
    return {bound: count - before.get(bound, 0.0) for bound, count in after.items()}


def quantile(observed: Mapping[float, float], share: float) -> float:
    """The bound of the bucket that the quantile falls into; 0 when nothing was observed."""
    buckets = sorted(observed.items())
    total = buckets[-1][1] if buckets else 0.0
    return next((bound for bound, count in buckets if total and count >= share * total), 0.0)


def free_port() -> int:
    """A loopback port that nobody has right now."""
    return free_ports(1)[0]


def free_ports(count: int) -> list[int]:
    """So many different ones."""
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in socks:
            sock.bind(("127.0.0.1", 0))
        return [int(sock.getsockname()[1]) for sock in socks]


@contextlib.contextmanager
def child(
    argv: Sequence[str], *, waits: Callable[[], bool] | None = None, within: float = START_TIMEOUT_S
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is killed at the end. Ready when it prints ``READY``, or when ``waits`` says so."""
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        _await(process, waits, within)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdout:
            process.stdout.close()


def python(module: str, *arguments: str) -> list[str]:
    """The command that runs a module of this project."""
    return [sys.executable, "-m", module, *arguments]


def ready() -> None:
    """Called by a peer when it serves."""
    print(READY, flush=True)


def accepts(port: int) -> Callable[[], bool]:
    """Whether a loopback port takes connections."""

    def probe() -> bool:
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", port)) == 0

    return probe


def children_of(pid: int) -> list[int]:
    """The direct children of a process, of whichever thread."""
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for children in lists for child in children.read_text().split()]


def _await(process: subprocess.Popen[bytes], waits: Callable[[], bool] | None, within: float) -> None:
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"{process.args!r} ended with {process.returncode}")
        if waits is not None:
            if waits():
                return
            select.select([], [], [], 0.02)
        elif (
            (out := process.stdout)
            and select.select([out], [], [], 0.2)[0]
            and out.readline().strip() == READY.encode()
        ):
            return
    raise RuntimeError(f"{process.args!r} did not come up within {within:g} s")
