"""The load of the gateway's benchmark: HTTP/1.1 clients on uvloop that parse no more than they must."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

TIMEOUT_S = 60.0
MODEL = "bench"
Where = int | str
"""A loopback port, or the path of a Unix socket."""
_STAMP = re.compile(rb"at=(\d+);")
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_LAST = b"0\r\n\r\n"


@dataclass
class Seen:
    """What calls were like, in seconds. ``reads``: how often data came, stream by stream."""

    took: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    lags: list[float] = field(default_factory=list)
    reads: list[int] = field(default_factory=list)
    statuses: dict[int, int] = field(default_factory=dict)

    @property
    def errors(self) -> int:
        """Calls that were not answered 200, to the end; status 0: no answer."""
        return sum(count for status, count in self.statuses.items() if status != 200)

    @property
    def calls(self) -> int:
        return sum(self.statuses.values())

    def add(self, more: Seen) -> None:
        """What other calls were like, too."""
        self.took += more.took
        self.first += more.first
        self.lags += more.lags
        self.reads += more.reads
        for status, count in more.statuses.items():
            self.statuses[status] = self.statuses.get(status, 0) + count


class Client(asyncio.Protocol):
    """One kept connection, one call at a time. ``seen`` collects."""

    def __init__(self) -> None:
        self.seen = Seen()
        self.lost = False
        self._on_end: Callable[[], object] | None = None
        self._reset()

    def _reset(self) -> None:
        self._head = b""
        self._left = -1
        self._tail = b""
        self._status = 0
        self._reads = 0
        self._first = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def send(self, request: bytes, on_end: Callable[[], object]) -> None:
        """A call; ``on_end`` when its answer is whole, or the connection is lost."""
        self._reset()
        self._on_end = on_end
        self._begun = time.perf_counter()
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._reads += 1
        if not self._status:
            self._head += data
            head, found, data = self._head.partition(b"\r\n\r\n")
            if not found:
                return
            self._status = int(head[9:12])
            length = _LENGTH.search(head)
            self._left = int(length[1]) if length else -1
        if self._left >= 0:
            self._left -= len(data)
            if self._left <= 0:
                self._end(self._status)
            return
        for stamp in _STAMP.finditer(data):
            self.seen.lags.append((time.monotonic_ns() - int(stamp[1])) / 1e9)
            self._first = self._first or time.perf_counter() - self._begun
        self._tail = (self._tail + data[-5:])[-5:]
        if self._tail == _LAST:
            self.seen.reads.append(self._reads)
            self._end(self._status if self._first else 0)

    def _end(self, status: int) -> None:
        seen, on_end = self.seen, self._on_end
        self._on_end = None
        seen.statuses[status] = seen.statuses.get(status, 0) + 1
        if status == 200:
            seen.took.append(time.perf_counter() - self._begun)
            if self._first:
                seen.first.append(self._first)
        if on_end is not None:
            on_end()

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        if self._on_end is not None:
            self._end(0)


def body(size: int, *, stream: bool = False, model: str = MODEL, text: str = "") -> bytes:
    """A chat completion's request of about ``size`` bytes, many messages long; ``text`` makes it another one."""
    fact = {"model": model, "stream": stream, "temperature": 0, "messages": [{"role": "user", "content": text or "hi"}]}
    chance = random.Random(size)
    messages = cast("list[dict[str, str]]", fact["messages"])
    used = len(json.dumps(fact))
    while (left := size - used - 40) > 0:
        words = " ".join(chance.choice(("alpha", "beta", "gamma", "delta")) for _ in range(200))[: max(1, left)]
        messages.append({"role": "user", "content": words})
        used += len(json.dumps(messages[-1])) + 2
    return json.dumps(fact).encode()


def post(target: str, headers: Mapping[str, str], body: bytes) -> bytes:
    """A request, head and all."""
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    head = f"POST {target} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n{lines}"
    return head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body


async def connect(port: Where, count: int) -> list[Client]:
    """So many open connections."""
    loop = asyncio.get_running_loop()
    if isinstance(port, str):
        return [(await loop.create_unix_connection(Client, port))[1] for _ in range(count)]
    return [(await loop.create_connection(Client, "127.0.0.1", port))[1] for _ in range(count)]


async def repeat(clients: Sequence[Client], request: Callable[[int], bytes], go: Callable[[int], bool]) -> Seen:
    """Each client calls again as soon as it is answered, while ``go`` (told how many calls have begun) says so.

    ``request`` gets the client's number. One that lost its connection stops.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()
    seen = Seen()
    begun, running = 0, len(clients)

    def step(number: int, client: Client) -> None:
        nonlocal begun, running
        if not client.lost and go(begun):
            begun += 1
            client.send(request(number), lambda: loop.call_soon(step, number, client))
            return
        running -= 1
        if not running and not done.done():
            done.set_result(None)

    for number, client in enumerate(clients):
        client.seen = seen
        step(number, client)
    await asyncio.wait_for(done, TIMEOUT_S)
    return seen


async def calls(port: Where, request: bytes, count: int, connections: int = 1) -> Seen:
    """``count`` calls over so many connections, one after the other on each. One more beforehand opens the way."""
    clients = await connect(port, connections)
    await repeat(clients, lambda _: request, lambda begun: begun < connections)
    seen = await repeat(clients, lambda _: request, lambda begun: begun < count)
    close(clients)
    return seen


async def closed_loop(port: Where, request: bytes, connections: int, seconds: float) -> tuple[Seen, float]:
    """As many calls as go through in ``seconds``; with the time that it really took."""
    clients = await connect(port, connections)
    await repeat(clients, lambda _: request, lambda begun: begun < connections)
    begin = time.perf_counter()
    seen = await repeat(clients, lambda _: request, lambda _: time.perf_counter() - begin < seconds)
    took = time.perf_counter() - begin
    close(clients)
    return seen, took


async def open_loop(ports: Sequence[Where], requests: Iterator[bytes], per_s: float, seconds: float) -> Seen:
    """Calls at a constant rate, whatever becomes of those before; each port in turn, connections kept."""
    loop = asyncio.get_running_loop()
    seen, idle = Seen(), {port: cast("list[Client]", []) for port in ports}
    done, under_way, total = loop.create_future(), 0, int(per_s * seconds)

    def ended(client: Client, port: Where) -> None:
        nonlocal under_way
        under_way -= 1
        if not client.lost:
            idle[port].append(client)
        if not under_way and not done.done() and seen.calls >= total:
            done.set_result(None)

    begin = loop.time()
    for number in range(total):
        await asyncio.sleep(max(0.0, begin + number / per_s - loop.time()))
        port = ports[number % len(ports)]
        client = None
        while idle[port] and client is None:
            client = idle[port].pop()
            client = None if client.lost else client
        if client is None:
            [client] = await connect(port, 1)
            client.seen = seen
        under_way += 1
        client.send(next(requests), lambda client=client, port=port: ended(client, port))  # type: ignore[misc]
    await asyncio.wait_for(done, TIMEOUT_S)
    for clients in idle.values():
        close(clients)
    return seen


def close(clients: Sequence[Client]) -> None:
    for client in clients:
        client.transport.abort()
