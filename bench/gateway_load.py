"""Many at the gateway at once: a hundred sandboxes streaming, document 001's sessions, a user who floods."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import tempfile
import time
from typing import Any

import uvloop

from bench import lib
from bench.gateway_arms import Arm, cortex, nginx, provider, section
from bench.peers import http_load as load
from bench.peers.provider import EVENTS, EVERY_S

SANDBOXES, WAVES, STREAMS = 100, 5, 4
STREAM_S = EVENTS * EVERY_S
CROWD_FIRST_P99_MS, CROWD_MB = 10.0, 150.0
A_MINUTE, THINK_MS = 44, 150
SESSIONS_MS = {2: 500.0, 3: 600.0, 4: 700.0}
SESSIONS_CPU, SESSIONS_MB = 20.0, 100.0
FLOOD_THINK_MS, FLOOD_WIDTH, FLOOD_AT_ONCE = 100, 64, 4
TIMER_NOISE = 0.1


def crowd(report: lib.Report, waves: int = WAVES) -> None:
    """All sandboxes stream at the same time, each through its own socket and forwarder.

    ``spread``: they begin one after the other within a stream's time and go on, as a hundred people do; this is what
    is held against the target. ``at a stroke``: all requests are sent in the same moment.
    """
    far = lib.free_port()
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="cx-"))
        stack.enter_context(provider(far))
        ours = stack.enter_context(cortex(directory, section(directory, [far]), slots=SANDBOXES, users=SANDBOXES))
        ways = {"direct": Arm((far,) * SANDBOXES), "cortex": ours}
        if (other := nginx(stack, directory, far)) is not None:
            ways["nginx"] = Arm(other.ports * SANDBOXES)
        seen = lib.interleaved(list(ways), waves, lambda name: _waves(ways[name]))
        gateway, forwarders = (lib.pss_bytes(pid) / 1e6 for pid in ours.pids)
    pairs = zip(seen["cortex"]["spread p99"], seen["direct"]["spread p99"], strict=True)
    first = lib.median([with_us - without for with_us, without in pairs])
    rows = [
        ["", "spread: first token p50, ms", "p99", "token lag p99", "at a stroke: first token p50", "p99", "errors"]
    ]
    for name, figures in lib.medians(seen).items():
        cells = [f"{figures[key]:.3g}" for key in ("spread p50", "spread p99", "lag p99", "stroke p50", "stroke p99")]
        rows.append([name, *cells, f"{sum(seen[name]['errors']):.0f}"])
    report.tables[f"{SANDBOXES} sandboxes stream at once, medians of {waves} rounds"] = rows
    report.figures["crowd"] = {**seen, "gateway_mb": gateway, "forwarders_mb": forwarders}
    report.notes.append(
        f"{SANDBOXES} sandboxes: gateway {gateway:.0f} MB, their forwarders (one process for all) {forwarders:.0f} MB"
    )
    report.targets += [
        lib.target(f"{SANDBOXES} sandboxes: first token added p99", "ms", first, CROWD_FIRST_P99_MS),
        lib.target(f"{SANDBOXES} sandboxes: errors", "", sum(seen["cortex"]["errors"]), 0),
        lib.target(f"{SANDBOXES} sandboxes: memory", "MB", gateway + forwarders, CROWD_MB),
    ]


def _waves(arm: Arm) -> dict[str, float]:
    """Figures of one round, ms."""
    request = arm.request(700, stream=True)
    clients: list[load.Client] = []

    async def stroke() -> load.Seen:
        return await load.repeat(clients, lambda _: request, lambda begun: begun < len(clients))

    async def spread(streams: int) -> load.Seen:
        seen = load.Seen()
        async with asyncio.TaskGroup() as group:
            for client in clients:
                group.create_task(_one_after_another(client, request, streams, seen))
                await asyncio.sleep(STREAM_S / len(clients))
        return seen

    async def go() -> tuple[load.Seen, load.Seen]:
        clients.extend([client for port in arm.ports for client in await load.connect(port, 1)])
        await spread(1)  # opens every way to its end
        both = await spread(STREAMS), await stroke()
        load.close(clients)
        return both

    alike, at_once = uvloop.run(go())
    return {
        "spread p50": lib.percentile(alike.first, 0.5) * 1e3,
        "spread p99": lib.percentile(alike.first, 0.99) * 1e3,
        "lag p99": lib.percentile(alike.lags, 0.99) * 1e3,
        "stroke p50": lib.percentile(at_once.first, 0.5) * 1e3,
        "stroke p99": lib.percentile(at_once.first, 0.99) * 1e3,
        "errors": float(alike.errors + at_once.errors),
    }


async def _one_after_another(client: load.Client, request: bytes, count: int, seen: load.Seen) -> None:
    seen.add(await load.repeat([client], lambda _: request, lambda begun: begun < count))


def sessions(report: lib.Report, seconds: float) -> None:
    """Document 001: 2, 3 and 4 sessions at 44 requests a minute each, with its limits (6 at once, 25 ms apart)."""
    rows = [["sessions", "calls", "p50, ms", "worst, ms", "errors", "of them 429", "CPU, % of a core", "memory, MB"]]
    for count, limit in SESSIONS_MS.items():
        seen, cpu, memory = _sessions(count, seconds)
        worst = max(seen.took, default=float("inf")) * 1e3
        limited = seen.statuses.get(429, 0)
        cells = [f"{lib.percentile(seen.took, 0.5) * 1e3:.1f}", f"{worst:.1f}", str(seen.errors), str(limited)]
        rows.append([str(count), str(seen.calls), *cells, f"{cpu:.2f}", f"{memory:.0f}"])
        report.targets += [
            lib.target(f"document 001, {count} sessions: slowest call", "ms", worst, limit),
            lib.target(f"document 001, {count} sessions: errors", "", seen.errors, 0),
        ]
    report.targets += [
        lib.target("document 001, 4 sessions: CPU", "% of a core", cpu, SESSIONS_CPU),
        lib.target("document 001, 4 sessions: memory", "MB", memory, SESSIONS_MB),
    ]
    report.tables[f"Document 001: {A_MINUTE} requests a minute a session, provider thinks {THINK_MS} ms"] = rows
    report.figures["document 001"] = rows[1:]
    report.notes.append(f"document 001: at the true rate, for {seconds:g} s of the minute each (--long: all of it)")


def _sessions(count: int, seconds: float) -> tuple[load.Seen, float, float]:
    """The calls, CPU in % of a core, memory in MB. Sessions begin together, the worst case for the limits."""
    far = lib.free_port()
    with tempfile.TemporaryDirectory(prefix="cx-") as directory, provider(far):
        limited = section(directory, [far], limits={"profile": "document-001"})
        with cortex(directory, limited, slots=count, users=count) as arm:
            request = arm.request(54_000, model=f"think-{THINK_MS}")
            before, begin = lib.cpu_of(arm.pids), time.perf_counter()
            seen = uvloop.run(_paced(arm, request, 60 / A_MINUTE, seconds))
            cpu = (lib.cpu_of(arm.pids) - before) / (time.perf_counter() - begin) * 100
            return seen, cpu, arm.memory_mb


async def _paced(arm: Arm, request: bytes, every_s: float, seconds: float) -> load.Seen:
    """Every session calls at the same moments."""
    loop, seen = asyncio.get_running_loop(), load.Seen()
    clients = [client for port in arm.ports for client in await load.connect(port, 1)]
    begin = loop.time()
    for number in range(max(1, int(seconds / every_s))):
        await asyncio.sleep(max(0.0, begin + number * every_s - loop.time()))
        said = len(clients)
        step = await load.repeat(clients, lambda _: request, lambda begun, said=said: begun < said)  # type: ignore[misc]
        seen.add(step)
    load.close(clients)
    return seen


def flood(report: lib.Report, calls: int = 30) -> None:
    """One user keeps the queue full; another's calls, one at a time, wait for one slot at most."""
    far = lib.free_port()
    with tempfile.TemporaryDirectory(prefix="cx-") as directory, provider(far):
        limits: dict[str, Any] = {"provider": {"concurrency": FLOOD_AT_ONCE}, "waiting": 4 * FLOOD_WIDTH}
        with cortex(directory, section(directory, [far], limits=limits), slots=2, users=2) as arm:
            request = arm.request(700, model=f"think-{FLOOD_THINK_MS}")
            alone = uvloop.run(load.calls(arm.ports[1], request, calls))
            flooded, noise = uvloop.run(_flooded(arm, request, calls))
    usual = statistics.median(alone.took)
    waited = [took - usual for took in flooded.took] or [float("inf")]
    slots = max(waited) * 1e3 / FLOOD_THINK_MS
    rows = [["", "calls", "p50, ms", "worst, ms", "errors"]]
    for name, seen in (("alone", alone), (f"while another floods ({noise.calls} calls)", flooded)):
        took = seen.took or [float("nan")]
        cells = [f"{lib.percentile(took, 0.5) * 1e3:.1f}", f"{max(took) * 1e3:.1f}", str(seen.errors)]
        rows.append([name, str(seen.calls), *cells])
    title = f"A user beside one with {FLOOD_WIDTH} calls waiting; {FLOOD_AT_ONCE} at once, {FLOOD_THINK_MS} ms each"
    report.tables[title] = rows
    report.figures["flood"] = {"alone": alone.took, "flooded": flooded.took, "slots": slots}
    # Timers of the stand-in and of a busy machine are late by some ms.
    name = "a flood delays another user by, at worst (a tenth is the timers')"
    report.targets += [
        lib.target(name, "slots", slots, 1 + TIMER_NOISE),
        lib.target("errors of the other user", "", flooded.errors, 0),
    ]


async def _flooded(arm: Arm, request: bytes, calls: int) -> tuple[load.Seen, load.Seen]:
    """The other user's calls, and the flood's."""
    over = asyncio.Event()
    noisy = await load.connect(arm.ports[0], FLOOD_WIDTH)
    quiet = await load.connect(arm.ports[1], 1)
    async with asyncio.TaskGroup() as group:
        noise = group.create_task(load.repeat(noisy, lambda _: request, lambda _: not over.is_set()))
        # Until the queue is as full as it gets: a second of the flood's own calls.
        await asyncio.sleep(1)
        seen = await load.repeat(quiet, lambda _: request, lambda begun: begun < calls)
        over.set()
    load.close([*noisy, *quiet])
    return seen, noise.result()
