"""HTTP/2 beside HTTP/1.1: the client of the benchmark speaks it right, and the figures are what they say."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, RequestReceived, StreamEnded

from bench import http2, lib
from bench.peers.h2_client import H2Client
from bench.peers.tls_load import CLIENTS, WIDTHS
from broker.cli.bench import find
from broker.errors import CortexError

HEADERS = [(b":method", b"POST"), (b":scheme", b"https"), (b":authority", b"x"), (b":path", b"/")]
WINDOW = 65_535
"""What a peer takes of a stream and of a connection until it says more (RFC 9113)."""


class Wire:
    """A transport; ``writes``: what was written, one by one."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.writes.append(data)


class Server:
    """The other end of ``client``. It takes more of a body only by ``allow``."""

    def __init__(self, client: H2Client) -> None:
        self._client, self.wire = client, Wire()
        self.h2 = H2Connection(H2Configuration(client_side=False, header_encoding=None))
        self.bodies: dict[int, bytes] = {}
        self.whole: list[int] = []
        self.h2.initiate_connection()
        client.connection_made(self.wire)  # type: ignore[arg-type]
        self.read()

    def read(self) -> int:
        """Takes what was written; in how many writes."""
        writes, self.wire.writes = self.wire.writes, []
        for event in self.h2.receive_data(b"".join(writes)):
            if isinstance(event, RequestReceived):
                self.bodies[event.stream_id] = b""
            elif isinstance(event, DataReceived):
                self.bodies[event.stream_id] += event.data
            elif isinstance(event, StreamEnded):
                self.whole.append(event.stream_id)
        return len(writes)

    def allow(self, size: int, stream: int) -> None:
        self.h2.increment_flow_control_window(size)
        self.h2.increment_flow_control_window(size, stream)
        self.send()

    def answer(self, stream: int, body: bytes) -> None:
        self.h2.send_headers(stream, [(b":status", b"200")])
        self.h2.send_data(stream, body, end_stream=True)
        self.send()

    def send(self) -> None:
        self._client.data_received(self.h2.data_to_send())


async def test_calls_share_a_connection_and_a_write_and_get_their_own_answers() -> None:
    client = H2Client()
    server = Server(client)
    calls = [asyncio.create_task(client.call(HEADERS, b"body %d" % number)) for number in range(3)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert server.read() == 1
    assert list(server.bodies.values()) == [b"body 0", b"body 1", b"body 2"]
    for stream in reversed(server.whole):
        server.answer(stream, b"to " + server.bodies[stream])
    assert await asyncio.gather(*calls) == [(200, b"to body %d" % number) for number in range(3)]


async def test_a_body_beyond_the_window_waits_for_the_server() -> None:
    client, body = H2Client(), bytes(range(256)) * 400
    server = Server(client)
    call = asyncio.create_task(client.call(HEADERS, body))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    server.read()
    assert (server.bodies[1], server.whole) == (body[:WINDOW], [])
    server.allow(1000, 1)
    server.read()
    assert (server.bodies[1], server.whole) == (body[: WINDOW + 1000], [])
    server.allow(len(body), 1)
    server.read()
    assert (server.bodies[1], server.whole) == (body, [1])
    server.answer(1, b"")
    assert await call == (200, b"")


@pytest.mark.parametrize("reset", [True, False])
async def test_a_call_that_is_not_answered_fails(reset: bool) -> None:
    client = H2Client()
    server = Server(client)
    call = asyncio.create_task(client.call(HEADERS, b"body"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    server.read()
    if reset:
        server.h2.reset_stream(1)
        server.send()
    else:
        client.connection_lost(None)
    with pytest.raises(ConnectionError):
        await call


def rounds(cpu: float, handshake: float) -> dict[str, list[float]]:
    """Two rounds, the other on a machine half as fast."""
    figures: dict[str, float] = {}
    for case in http2.CASES:
        figures |= {f"{case}: {what}": cpu for what in ("cpu", "server's cpu", "p50", "p99", "per s")}
    for width in WIDTHS:
        figures |= {f"cold, {width}: {what}": handshake * width for what in ("cpu", "all")}
    return {name: [value, value * 2] for name, value in figures.items()}


def seen(ours: float, h2: float) -> dict[str, Any]:
    """CPU a call; a connection costs us 2 ms, one of h2's is free."""
    found = {name: rounds(1.0, 2.0) for name in [*CLIENTS, http2.WHOLE]}
    return found | {http2.OURS: rounds(ours, 2.0), http2.PLAIN: rounds(h2, 0.0)}


@pytest.mark.parametrize(("h2", "value", "ok"), [(0.3, 3.0, True), (0.08, 0.8, False)])
def test_the_choice_holds_while_http2_costs_more(h2: float, value: float, ok: bool) -> None:
    report = lib.Report("http2")
    http2.fill(report, seen(0.1, h2), 2)
    [target] = report.targets
    assert target.value == pytest.approx(value)
    assert target.ok is ok
    assert report.figures["ratios"]["httpx, HTTP/2 to HTTP/1.1"] == dict.fromkeys(http2.CASES, 1.0)


def test_what_a_handshake_saves_is_spent_after_so_many_calls() -> None:
    for case in http2.CASES:
        assert http2.paid_back(lib.medians(seen(0.1, 0.3)), case) == pytest.approx(10)
        assert http2.paid_back(lib.medians(seen(0.3, 0.1)), case) == float("inf")


def test_it_is_found_by_its_name() -> None:
    assert find("http2") is http2
    with pytest.raises(CortexError):
        find("http3")
