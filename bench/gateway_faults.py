"""Document 004's case: a steady load while one of three servers dies and comes back; then questions that repeat."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import subprocess
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import uvloop

from bench import lib
from bench.gateway_arms import Arm, ask, cortex, provider, section
from bench.peers import http_load as load

PER_S, THINK_MS = 50.0, 40
SERVERS, SANDBOXES = 3, 10
KILL_AFTER_S = 0.53
NEXT_CALL_S = 0.1
"""From the end of a server's rest until a call of the load tries it; 20 ms are between two."""
ERRORS_PERCENT, P95_S = 1.0, 1.0
QUESTIONS, REPEATING_S, ALIKE = 200, 20.0, 500
HITS_PERCENT, HIT_P50_MS = 70.0, 1.0


def failover(report: lib.Report, seconds: float) -> None:
    """Least connections, max_fails 3 as the document has it; one server is killed after a third, back after two."""
    ports = lib.free_ports(SERVERS)
    # The document's 30 s, or what leaves the server time to be asked again before the end.
    rest_s = min(30.0, seconds / 10)
    policy: dict[str, Any] = {"max_fails": 3, "fail_timeout_s": rest_s, "retries": 2}
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="cx-"))
        first, *_ = [stack.enter_context(provider(port)) for port in ports]
        arm = stack.enter_context(
            cortex(directory, section(directory, ports, **policy), slots=SANDBOXES, users=SANDBOXES)
        )
        request = arm.request(700, model=f"think-{THINK_MS}")

        def load_for(killing: subprocess.Popen[bytes] | None = None) -> load.Seen:
            return uvloop.run(_steady(arm, request, seconds / 3, killing))

        before, without = load_for(), load_for(first)
        first.wait()
        stack.enter_context(provider(ports[0]))
        back = time.monotonic_ns()
        after = load_for()
        shares = [uvloop.run(ask(port, "count")) for port in ports]
        called = uvloop.run(ask(ports[0], "first"))
    again_s = (called - back) / 1e9 if called else float("inf")
    rows = [["", "calls", "errors", "p50, ms", "p95, ms", "worst, ms"]]
    whole = load.Seen()
    for name, seen in (("all three", before), ("one killed", without), ("it is back", after)):
        whole.add(seen)
        took = seen.took or [float("inf")]
        cells = [f"{lib.percentile(took, share) * 1e3:.1f}" for share in (0.5, 0.95, 1)]
        rows.append([name, str(seen.calls), str(seen.errors), *cells])
    errors = whole.errors / whole.calls * 100
    p95 = lib.percentile(whole.took or [float("inf")], 0.95)
    report.tables[
        f"Document 004: {PER_S:g} calls a second for {seconds:g} s over {SERVERS} servers, {THINK_MS} ms each"
    ] = rows
    report.figures["failover"] = {
        "rows": rows[1:],
        "calls by server since its start": shares,
        "back until its first call, s": again_s,
    }
    report.notes.append(
        f"document 004: fail_timeout {rest_s:g} s; the server that came back was given {shares[0]} calls"
    )
    report.targets += [
        lib.target("document 004: errors", "%", errors, ERRORS_PERCENT),
        lib.target("document 004: p95", "s", p95, P95_S),
        lib.target("document 004: back until it is given a call", "s", again_s, rest_s + NEXT_CALL_S),
    ]


async def _steady(arm: Arm, request: bytes, seconds: float, killing: subprocess.Popen[bytes] | None) -> load.Seen:
    """The load; ``killing`` dies in the midst of it, with calls under way."""
    if killing is not None:
        asyncio.get_running_loop().call_later(KILL_AFTER_S, killing.kill)
    return await load.open_loop(arm.ports, itertools.repeat(request), PER_S, seconds)


def repeating(report: lib.Report, seconds: float = REPEATING_S) -> None:
    """Questions that repeat as those of a help desk do: 200 of them, the n-th asked 1/n as often as the first."""
    port = lib.free_port()
    with tempfile.TemporaryDirectory(prefix="cx-") as directory, provider(port):
        cached = section(directory, [port], cache={"enabled": True})
        with cortex(directory, cached, slots=SANDBOXES, users=SANDBOXES) as arm:
            asked = [arm.request(700, model=f"think-{THINK_MS}", text=f"question {n}") for n in range(QUESTIONS)]
            requests = (asked[number] for number in popular(QUESTIONS))
            seen = uvloop.run(load.open_loop(arm.ports, requests, PER_S, seconds))
            missed = uvloop.run(ask(port, "count"))
            same = uvloop.run(load.calls(arm.ports[0], asked[0], ALIKE))
            stream = uvloop.run(load.calls(arm.ports[0], arm.request(700, stream=True), ALIKE // 10))
            fresh = uvloop.run(ask(port, "count")) - missed
    hits = 100 * (1 - missed / seen.calls)
    rows = [["", "calls", "p50, ms", "p99, ms", "errors"]]
    for name, part in (("the workload", seen), ("one question again and again", same), ("one stream", stream)):
        took = part.took or [float("inf")]
        cells = [f"{lib.percentile(took, at) * 1e3:.3g}" for at in (0.5, 0.99)]
        rows.append([name, str(part.calls), *cells, str(part.errors)])
    report.tables[f"Repeating questions: {QUESTIONS}, popularity 1/rank, {PER_S:g} a second for {seconds:g} s"] = rows
    p50 = lib.percentile(same.took or [float("inf")], 0.5) * 1e3
    report.figures["cache"] = {"hit percent": hits, "hit p50 ms": p50, "rows": rows[1:]}
    report.notes.append(f"repeating questions: {hits:.1f} % hits; of what was asked alike {fresh} calls went out")
    report.targets += [
        lib.target_least("document 004: cache hits", "%", hits, HITS_PERCENT),
        lib.target("document 004: a hit, p50", "ms", p50, HIT_P50_MS),
        lib.target("errors of the repeating workload", "", seen.errors + same.errors + stream.errors, 0),
    ]


def popular(questions: int, seed: int = 4) -> Iterator[int]:
    """Numbers below ``questions``: n is drawn in proportion to 1/(n + 1) (Zipf's law)."""
    chance, weights = random.Random(seed), [1 / (rank + 1) for rank in range(questions)]
    while True:
        yield from chance.choices(range(questions), weights, k=256)
