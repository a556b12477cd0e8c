"""The relay beside HAProxy, nginx and a proxy written with the websockets library; then the whole path.

All have the same far end (``bench.peers.echo``) behind the same kind of socket and the same load in
front. Rounds are interleaved, figures are medians, and a ratio is the median of the ratios within a
round, so that a busy machine troubles all alike. CPU is the proxy process's own.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import uvloop

from bench import lib
from bench.path import whole_path
from bench.peers import configs, load

ROUNDS, LONG_ROUNDS = 7, 21
OVER_HAPROXY, OVER_WEBSOCKETS = 1.15, 0.5
"""CPU per message, at most so many times theirs."""


@dataclass(frozen=True)
class Case:
    """``turns`` > 0: ping-pong; else a stream of ``count`` frames a connection."""

    name: str
    title: str
    connections: int
    payload: int
    turns: int = 0
    count: int = 0


CASES = (
    Case("pingpong", "round trip, 64 connections, 256 B", 64, 256, turns=500),
    Case("stream", "16 KiB frame streamed", 4, 16_384, count=6_000),
    Case("tokens", "80 B frame streamed", 8, 80, count=60_000),
)
LATENCY_TURNS = 1_500


@dataclass(frozen=True)
class Peer:
    """A running proxy: where it listens and whose CPU counts."""

    port: int
    pids: tuple[int, ...]
    share: float = 1.0
    """Of a case's messages: a slow one needs fewer to be measured as well."""


@contextlib.contextmanager
def peers(directory: str) -> Iterator[dict[str, Peer]]:
    """The far end and, before it, every proxy that is installed."""
    ws, stream = f"{directory}/ws.sock", f"{directory}/stream.sock"
    with contextlib.ExitStack() as stack:
        stack.enter_context(lib.child(lib.python("bench.peers.echo", directory)))
        found: dict[str, Peer] = {}
        for name, module, upstream in (("cortex", "front", stream), ("websockets", "ws_proxy", ws)):
            port = lib.free_port()
            process = stack.enter_context(lib.child(lib.python(f"bench.peers.{module}", upstream, str(port))))
            found[name] = Peer(port, (process.pid,), 0.2 if name == "websockets" else 1.0)
        if shutil.which("haproxy"):
            port = lib.free_port()
            config = Path(directory, "haproxy.cfg")
            config.write_text(configs.haproxy(port, ws))
            argv = ["haproxy", "-db", "-f", str(config)]
            process = stack.enter_context(lib.child(argv, waits=lib.accepts(port)))
            found["haproxy"] = Peer(port, (process.pid,))
        if shutil.which("nginx"):
            port = lib.free_port()
            config = Path(directory, "nginx.conf")
            config.write_text(configs.nginx(port, ws, directory))
            argv = ["nginx", "-p", directory, "-c", str(config)]
            process = stack.enter_context(lib.child(argv, waits=lib.accepts(port)))
            found["nginx"] = Peer(port, (process.pid, *lib.children_of(process.pid)))
        yield found


async def run_case(peer: Peer, case: Case) -> dict[str, float]:
    """CPU per message, in microseconds."""
    clients = await load.connect(peer.port, case.connections)
    before = lib.cpu_of(peer.pids)
    each = int((case.turns or case.count) * peer.share)
    if case.turns:
        await load.echo(clients, payload=case.payload, turns=each)
    else:
        await load.stream(clients, payload=case.payload, count=each)
    used = lib.cpu_of(peer.pids) - before
    load.close(clients)
    return {case.name: used / each / case.connections * 1e6}


async def run_latency(peer: Peer) -> dict[str, float]:
    """Round trips on one idle connection, 64 B, in microseconds."""
    clients = await load.connect(peer.port, 1)
    trips = await load.echo(clients, payload=64, turns=LATENCY_TURNS)
    load.close(clients)
    return {"p50": lib.percentile(trips, 0.5) * 1e6, "p99": lib.percentile(trips, 0.99) * 1e6}


def measure(found: dict[str, Peer], rounds: int) -> dict[str, dict[str, list[float]]]:
    """What was measured, round by round, by proxy and figure."""

    def one_round(name: str) -> dict[str, float]:
        figures = uvloop.run(run_latency(found[name]))
        for case in CASES:
            figures |= uvloop.run(run_case(found[name], case))
        return figures

    return lib.interleaved(list(found), rounds, one_round)


def relay_report(report: lib.Report, rounds: int) -> None:
    with tempfile.TemporaryDirectory(prefix="cortex-bench-") as directory, peers(directory) as found:
        seen = measure(found, rounds)
    figures = lib.medians(seen)
    head = ["proxy", "round trip p50 µs", "p99 µs", *[f"CPU µs: {case.title}" for case in CASES]]
    rows = [head]
    for name, values in figures.items():
        rows.append([name, *[f"{values[figure]:.2f}" for figure in ("p50", "p99", *[case.name for case in CASES])]])
    report.tables["Relay"] = rows
    report.figures["relay"] = seen
    for case in CASES:
        for peer, limit in (("haproxy", OVER_HAPROXY), ("websockets", OVER_WEBSOCKETS)):
            if peer in seen:
                pairs = zip(seen["cortex"][case.name], seen[peer][case.name], strict=True)
                ratio = lib.median([ours / theirs for ours, theirs in pairs])
                report.targets.append(lib.target(f"relay.{case.name}.cpu_over_{peer}", "x", ratio, limit))
    if "haproxy" not in seen:
        report.targets.append(lib.Target("relay.haproxy_installed", "", 0, 1, False))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="cortex bench relay", description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON; - is stdout")
    parser.add_argument("--long", action="store_true", help="more rounds")
    parser.add_argument("--rounds", type=int, help="rounds of the comparison")
    arguments = parser.parse_args(argv)
    report = lib.Report("relay")
    relay_report(report, arguments.rounds or (LONG_ROUNDS if arguments.long else ROUNDS))
    uvloop.run(whole_path(report, long=arguments.long))
    return report.finish(arguments.json)


if __name__ == "__main__":
    sys.exit(main())
