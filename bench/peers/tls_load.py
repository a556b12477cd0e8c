"""One HTTP client under load over TLS, alone in its process.

``python -m bench.peers.tls_load CLIENT PORT CA SECONDS PID``: CLIENT is a name in ``CLIENTS``, CA the PEM file of what
to trust, SECONDS how long each case runs, PID the server's process. Prints its figures as a JSON object, in ms.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

import uvloop

from bench import lib
from bench.peers.http_load import body
from broker.gateway.dialer import Dialer
from broker.gateway.fetch import fetch
from broker.gateway.resolve import Resolver
from broker.gateway.routes import Origin
from broker.gateway.stats import Stats
from broker.gateway.upstream import Pool
from broker.host.tasks import TaskOwner

SIZES = {"700 B": 700, "54 kB": 54_000}
WIDTHS = (1, 16, 64)
COLD_TIMES = 3
TIMEOUT_S = 20.0
CHAT = "/v1/chat/completions"
HEADERS = {
    "authorization": "Bearer sk-real-0123456789abcdef",
    "content-type": "application/json",
    "accept": "application/json",
    "accept-encoding": "identity",
    "user-agent": "bench/1.0",
}
Ask = Callable[[bytes], Awaitable[int]]
"""Makes a call with this body; its status."""


@dataclass(frozen=True)
class Client:
    """``drop``: closes its connections and keeps their TLS sessions; None: it resumes none."""

    ask: Ask
    drop: Callable[[], None] | None = None


Open = Callable[[], AbstractAsyncContextManager[Client]]
"""A client that has no connection yet."""


def cortex(port: int, ca: str) -> Open:
    """The gateway's own: pool, TLS and parser, without what the gateway does with a call."""
    return lambda: _cortex(port, ca)


@contextlib.asynccontextmanager
async def _cortex(port: int, ca: str) -> AsyncIterator[Client]:
    tasks = TaskOwner("bench")
    resolver = Resolver(tasks, lambda: TIMEOUT_S)
    pool = Pool(Dialer(resolver, lambda: TIMEOUT_S), Stats(), lambda: 65_536, tasks)
    origin = Origin("https", "127.0.0.1", port, ca, private=True)
    lines = "".join(f"{name}: {value}\r\n" for name, value in {"host": origin.authority, **HEADERS}.items()).encode()
    target = CHAT.encode()

    async def ask(data: bytes) -> int:
        answer = await fetch(pool, origin, b"POST", target, lines, data, timeout_s=TIMEOUT_S, max_bytes=2**20)
        return answer.status

    try:
        yield Client(ask, pool.close)
    finally:
        pool.close()
        await tasks.close()


def h2_alone(port: int, ca: str) -> Open:
    """The ``h2`` package and asyncio."""
    return lambda: _h2(port, ca)


@contextlib.asynccontextmanager
async def _h2(port: int, ca: str) -> AsyncIterator[Client]:
    from bench.peers import h2_client  # of the development environment, as is httpx

    opening: asyncio.Task[h2_client.H2Client] | None = None
    headers = [
        (b":method", b"POST"),
        (b":scheme", b"https"),
        (b":authority", b"127.0.0.1:%d" % port),
        (b":path", CHAT.encode()),
        *((name.encode(), value.encode()) for name, value in HEADERS.items()),
    ]

    async def ask(data: bytes) -> int:
        nonlocal opening
        if opening is None:
            opening = asyncio.create_task(h2_client.connect(port, _context(ca, "h2")))
        client = await opening if not opening.done() else opening.result()
        status, _ = await client.call([*headers, (b"content-length", b"%d" % len(data))], data)
        return status

    try:
        yield Client(ask)
    finally:
        if opening is not None:
            (await opening).close()


def httpx_with(port: int, ca: str, *, http2: bool) -> Open:
    return lambda: _httpx(port, ca, http2=http2)


@contextlib.asynccontextmanager
async def _httpx(port: int, ca: str, *, http2: bool) -> AsyncIterator[Client]:
    import httpx

    limits = httpx.Limits(max_connections=max(WIDTHS), max_keepalive_connections=max(WIDTHS))
    context = _context(ca, "h2" if http2 else "http/1.1")
    url = f"https://127.0.0.1:{port}{CHAT}"
    async with httpx.AsyncClient(
        http1=not http2, http2=http2, verify=context, limits=limits, timeout=TIMEOUT_S, trust_env=False
    ) as client:

        async def ask(data: bytes) -> int:
            answer = await client.post(url, content=data, headers=HEADERS)
            if answer.http_version != ("HTTP/2" if http2 else "HTTP/1.1"):
                raise RuntimeError(f"it spoke {answer.http_version}")
            return answer.status_code

        yield Client(ask)


def _context(ca: str, protocol: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=ca)
    context.set_alpn_protocols([protocol])
    return context


CLIENTS: dict[str, Callable[[int, str], Open]] = {
    "cortex, HTTP/1.1": cortex,
    "h2 alone, HTTP/2": h2_alone,
    "httpx, HTTP/1.1": lambda port, ca: httpx_with(port, ca, http2=False),
    "httpx, HTTP/2": lambda port, ca: httpx_with(port, ca, http2=True),
}


async def measure(opened: Open, seconds: float, server: int) -> dict[str, float]:
    """Every case: calls over open connections, then, at each width, the first calls of a client that has none."""
    figures: dict[str, float] = {}
    async with opened() as client:
        for title, size in SIZES.items():
            for width in WIDTHS:
                found = await _loaded(client.ask, body(size), width, seconds, server)
                figures |= {f"{title}, {width}: {name}": value for name, value in found.items()}
    for width in WIDTHS:
        runs = [await _cold(opened, width) for _ in range(COLD_TIMES)]
        figures |= {f"cold, {width}: {name}": lib.median([run[name] for run in runs]) for name in runs[0]}
    return figures


async def _loaded(ask: Ask, data: bytes, width: int, seconds: float, server: int) -> dict[str, float]:
    """``width`` calls are under way all the time."""
    took: list[float] = []

    async def one(until: float) -> None:
        while (begin := time.perf_counter()) < until:
            _sound(await ask(data))
            took.append(time.perf_counter() - begin)

    async def all_of_them(until: float) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(width):
                group.create_task(one(until))

    # Every connection is opened, and has grown its buffers.
    await all_of_them(time.perf_counter() + seconds / 5)
    took.clear()
    cpu, far, begin = time.process_time(), lib.cpu_seconds(server), time.perf_counter()
    await all_of_them(begin + seconds)
    cpu, far, whole = time.process_time() - cpu, lib.cpu_seconds(server) - far, time.perf_counter() - begin
    return {
        "cpu": cpu / len(took) * 1e3,
        "server's cpu": far / len(took) * 1e3,
        "p50": lib.percentile(took, 0.5) * 1e3,
        "p99": lib.percentile(took, 0.99) * 1e3,
        "per s": len(took) / whole,
    }


async def _cold(opened: Open, width: int) -> dict[str, float]:
    """From nothing until all are answered, the TLS context included; then once more with the sessions of before."""
    async with opened() as client:
        cpu, all_of_it = await _first_calls(client.ask, width)
        figures = {"cpu": cpu, "all": all_of_it}
        if client.drop is not None:
            client.drop()
            cpu, all_of_it = await _first_calls(client.ask, width)
            figures |= {"resumed cpu": cpu, "resumed all": all_of_it}
    return figures


async def _first_calls(ask: Ask, width: int) -> tuple[float, float]:
    """CPU and time."""
    data = body(SIZES["700 B"])
    cpu, begin = time.process_time(), time.perf_counter()
    for status in await asyncio.gather(*(ask(data) for _ in range(width))):
        _sound(status)
    return (time.process_time() - cpu) * 1e3, (time.perf_counter() - begin) * 1e3


def _sound(status: int) -> None:
    if status != 200:
        raise RuntimeError(f"answered {status}")


if __name__ == "__main__":
    name, number, file, wanted, pid = sys.argv[1:]
    made = CLIENTS[name](int(number), Path(file).read_text())
    print(json.dumps(uvloop.run(measure(made, float(wanted), int(pid)))))
