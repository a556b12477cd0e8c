"""How much bring-ups vary, between runs and between hosts: a data set that grows, and what it says.

The data set is JSON lines, a run each: when, on what host, which driver, and milliseconds by stage. Copy the lines
of several hosts into one file to compare them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.lib import percentile

TOTAL = "create → ready"
SLOWEST = 3
"""Stages that are named for each host."""


@dataclass(frozen=True)
class Run:
    """One bring-up. ``at``: seconds since the epoch; ``stages``: milliseconds."""

    at: float
    driver: str
    host: dict[str, Any]
    stages: dict[str, float]

    @property
    def place(self) -> str:
        """The host for people: its name, and where and what it is as far as it knows."""
        more = [str(self.host.get(fact) or "") for fact in ("region", "machine_type", "accelerator")]
        told = ", ".join(fact for fact in more if fact)
        name = str(self.host.get("host") or "?")
        return f"{name} ({told})" if told else name


def default_path() -> Path:
    """$XDG_STATE_HOME/cortex/bench/bringup.jsonl."""
    state = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local/state")
    return Path(state) / "cortex" / "bench" / "bringup.jsonl"


def record(path: Path, runs: Iterable[Run]) -> None:
    """Appends. Raises ``OSError``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for run in runs:
            file.write(json.dumps(asdict(run), separators=(",", ":")) + "\n")


def read(path: Path) -> list[Run]:
    """All runs. Raises ``OSError``, and ``ValueError`` with the number of a line that is no run."""
    runs = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            told = json.loads(line)
            stages = {str(stage): float(ms) for stage, ms in told["stages"].items()}
            runs.append(Run(float(told["at"]), str(told["driver"]), dict(told["host"]), stages))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}:{number}: not a run: {error}") from error
    return runs


def spread(values: Sequence[float]) -> float:
    """Half of the range in the middle, by the median: 0 for runs that are all alike."""
    middle = percentile(values, 0.5)
    return (percentile(values, 0.75) - percentile(values, 0.25)) / middle if middle else 0.0


def by_stage(runs: Sequence[Run]) -> dict[str, list[float]]:
    """Stage → milliseconds over the runs that had it."""
    found: dict[str, list[float]] = {}
    for run in runs:
        for stage, ms in run.stages.items():
            found.setdefault(stage, []).append(ms)
    return found


def groups(runs: Iterable[Run]) -> dict[tuple[str, str], list[Run]]:
    """(driver, place) → its runs, in that order."""
    found: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        found.setdefault((run.driver, run.place), []).append(run)
    return dict(sorted(found.items()))


def stage_table(runs: Sequence[Run]) -> list[list[str]]:
    """A row a stage, the slowest first."""
    rows = [["stage", "runs", "median ms", "p95 ms", "spread"]]
    stages = sorted(by_stage(runs).items(), key=lambda item: -percentile(item[1], 0.5))
    for stage, values in stages:
        figures = (percentile(values, 0.5), percentile(values, 0.95))
        rows.append([stage, str(len(values)), *(f"{value:.1f}" for value in figures), f"{spread(values):.0%}"])
    return rows


def host_table(runs: Sequence[Run]) -> list[list[str]]:
    """A row a driver and host, with the stages that take longest there."""
    rows = [["driver", "host", "runs", f"{TOTAL}: median ms", "p95 ms", "spread", "slowest stages (median ms)"]]
    for (driver, place), of_host in groups(runs).items():
        stages = by_stage(of_host)
        totals = stages.pop(TOTAL, [0.0])
        single = [(stage, values) for stage, values in stages.items() if "→" not in stage]
        slowest = sorted(single, key=lambda item: -percentile(item[1], 0.5))[:SLOWEST]
        named = ", ".join(f"{stage} {percentile(values, 0.5):.0f}" for stage, values in slowest)
        figures = [f"{percentile(totals, share):.1f}" for share in (0.5, 0.95)]
        rows.append([driver, place, str(len(of_host)), *figures, f"{spread(totals):.0%}", named])
    return rows
