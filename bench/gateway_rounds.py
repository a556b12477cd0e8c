"""The gateways side by side: what each adds to a call and to a stream, what it costs, how many calls it bears.

Every round measures every gateway and the provider itself (direct), in turning order. What is added is the
difference to direct within a round; figures are medians over the rounds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import uvloop

from bench import lib
from bench.gateway_arms import Arm, arms
from bench.peers import http_load as load

Figures = dict[str, float]
Rounds = Mapping[str, Mapping[str, Sequence[float]]]
SIZES = {"700 B": 700, "54 kB": 54_000, "600 kB": 600_000}
CONCURRENT = 64
FEWEST = 8
ADDED_P50_MS, ADDED_P99_MS, ADDED_FIRST_MS, LAG_OVER_NGINX_MS = 0.3, 1.0, 0.5, 1.0
CPU_MS, STREAM_CPU_OVER_NGINX, PER_S = 0.15, 2.0, 4000


@dataclass(frozen=True)
class Sizes:
    """How much a round does: calls one after the other (of each size), streams likewise, seconds under load."""

    calls: int = 800
    streams: int = 4
    load_s: float = 2.0
    streams_at_once: int = 192


TINY = Sizes(calls=20, streams=1, load_s=0.2, streams_at_once=CONCURRENT)


def one_round(arm: Arm, sizes: Sizes) -> Figures:
    """One gateway's figures: ms, calls a second, MB."""
    figures: Figures = {}
    for title, size in SIZES.items():
        figures |= _in_turn(arm, title, size, sizes.calls if size < 100_000 else sizes.calls // 4)
    figures |= _under_load(arm, sizes.load_s)
    if arm.streams:
        figures |= _streams(arm, sizes)
    figures["memory"] = arm.memory_mb
    return figures


def _in_turn(arm: Arm, title: str, size: int, count: int) -> Figures:
    wanted = max(FEWEST, int(count * arm.share))
    before = lib.cpu_of(arm.pids)
    seen = uvloop.run(load.calls(arm.port, arm.request(size), wanted))
    used = lib.cpu_of(arm.pids) - before
    _sound(seen, f"{title} in turn")
    return {
        f"{title} p50": lib.percentile(seen.took, 0.5) * 1e3,
        f"{title} p99": lib.percentile(seen.took, 0.99) * 1e3,
        f"{title} cpu": used / (wanted + 1) * 1e3,
    }


def _under_load(arm: Arm, seconds: float) -> Figures:
    before = lib.cpu_of(arm.pids)
    seen, took = uvloop.run(load.closed_loop(arm.port, arm.request(700), CONCURRENT, seconds))
    used = lib.cpu_of(arm.pids) - before
    return {
        "per s": len(seen.took) / took,
        "load p50": lib.percentile(seen.took, 0.5) * 1e3,
        "load p99": lib.percentile(seen.took, 0.99) * 1e3,
        "load cpu": used / (seen.calls + CONCURRENT) * 1e3,
        "load errors": float(seen.errors),
    }


def _streams(arm: Arm, sizes: Sizes) -> Figures:
    request = arm.request(700, stream=True)
    alone = uvloop.run(load.calls(arm.port, request, sizes.streams))
    _sound(alone, "streams in turn")
    wanted = max(CONCURRENT, int(sizes.streams_at_once * arm.share))
    before = lib.cpu_of(arm.pids)
    crowd = uvloop.run(load.calls(arm.port, request, wanted, CONCURRENT))
    used = lib.cpu_of(arm.pids) - before
    return {
        "first p50": lib.percentile(alone.first, 0.5) * 1e3,
        "lag p99": lib.percentile(alone.lags, 0.99) * 1e3,
        "reads": sum(alone.reads) / len(alone.reads),
        "stream cpu": used / (wanted + CONCURRENT) * 1e3,
        "streams errors": float(crowd.errors),
    }


def _sound(seen: load.Seen, what: str) -> None:
    if seen.errors:
        raise RuntimeError(f"{what}: answers by status {seen.statuses}")


def added(seen: Rounds, name: str, figure: str, to: str = "direct") -> float:
    """The median of the differences within a round."""
    pairs = zip(seen[name][figure], seen[to][figure], strict=True)
    return lib.median([ours - theirs for ours, theirs in pairs])


def ratio(seen: Rounds, name: str, figure: str, to: str) -> float:
    """The median of the ratios within a round."""
    pairs = zip(seen[name][figure], seen[to][figure], strict=True)
    return lib.median([ours / theirs for ours, theirs in pairs if theirs])


def compare(report: lib.Report, rounds: int, sizes: Sizes) -> None:
    """Adds the comparison's tables and targets."""
    with tempfile.TemporaryDirectory(prefix="cx-") as directory, arms(directory, report.notes) as found:
        seen = lib.interleaved(list(found), rounds, lambda name: one_round(found[name], sizes))
    report.figures["rounds"] = seen
    report.tables |= tables(seen, rounds)
    report.targets += targets(seen)


def tables(seen: Rounds, rounds: int) -> dict[str, list[list[str]]]:
    middle = lib.medians(seen)
    latency = [["gateway", *(f"{title} {what}" for title in SIZES for what in ("+p50", "+p99", "CPU"))]]
    load_rows = [["gateway", "calls/s", "p50", "p99", "CPU a call", "errors", "PSS MB"]]
    streams = [["gateway", "first token +p50", "token lag p99", "reads a stream", "CPU a stream", "errors"]]
    for name, figures in middle.items():
        latency.append(
            [name, *(_cell(seen, name, f"{title} {what}") for title in SIZES for what in ("p50", "p99", "cpu"))]
        )
        load_rows.append(
            [name, f"{figures['per s']:.0f}"]
            + [f"{figures[key]:.3g}" for key in ("load p50", "load p99", "load cpu")]
            + [f"{sum(seen[name]['load errors']):.0f}", f"{figures['memory']:.0f}"]
        )
        if "first p50" in figures:
            streams.append(
                [name, _cell(seen, name, "first p50")]
                + [f"{figures[key]:.3g}" for key in ("lag p99", "reads", "stream cpu")]
                + [f"{sum(seen[name]['streams errors']):.0f}"]
            )
    title = f"medians of {rounds} rounds, ms; direct: whole times"
    return {
        f"One call after the other: added to direct, and CPU a call; {title}": latency,
        f"{CONCURRENT} connections, 700 B, as fast as it goes; {title}": load_rows,
        f"Streams of 20 tokens, 10 ms apart (CPU: {CONCURRENT} at once); {title}": streams,
    }


def _cell(seen: Rounds, name: str, figure: str) -> str:
    if name == "direct":
        return "" if figure.endswith("cpu") else f"{lib.median(seen[name][figure]):.3g}"
    value = lib.median(seen[name][figure]) if figure.endswith("cpu") else added(seen, name, figure)
    return f"{value:.3g}"


def targets(seen: Rounds) -> list[lib.Target]:
    """What ours is held against."""
    ours = lib.medians(seen)["cortex"]
    found = [
        lib.target("54 kB: added p50", "ms", added(seen, "cortex", "54 kB p50"), ADDED_P50_MS),
        lib.target("54 kB: added p99", "ms", added(seen, "cortex", "54 kB p99"), ADDED_P99_MS),
        lib.target("time to first token: added p50", "ms", added(seen, "cortex", "first p50"), ADDED_FIRST_MS),
        lib.target(f"CPU a call, {CONCURRENT} at once", "ms", ours["load cpu"], CPU_MS),
        lib.target_least(f"calls a second, {CONCURRENT} at once", "", ours["per s"], PER_S),
        lib.target("errors under load", "", sum(seen["cortex"]["load errors"]), 0),
    ]
    if "nginx" not in seen:
        return [*found, lib.target("nginx is not installed", "", 1, 0)]
    lag, cpu = added(seen, "cortex", "lag p99", "nginx"), ratio(seen, "cortex", "stream cpu", "nginx")
    return [
        *found,
        lib.target("token lag p99 over nginx's", "ms", lag, LAG_OVER_NGINX_MS),
        lib.target("CPU a stream over nginx's", "times", cpu, STREAM_CPU_OVER_NGINX),
    ]
