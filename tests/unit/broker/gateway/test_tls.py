"""TLS sessions: resumed with the server that gave them, on both event loops, and nowhere else."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import uvloop

from broker.errors import CortexError
from broker.gateway import tls
from broker.gateway.context import Context
from broker.gateway.fetch import fetch
from broker.gateway.routes import Origin
from broker.host.tasks import TaskOwner
from tests.integration.gateway.support import make_ca

OK = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok"
LOOPS = pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
VERSIONS = pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])


class Server:
    """``resumed``: of each connection, in order."""

    def __init__(self, directory: Path, version: ssl.TLSVersion) -> None:
        self.context, self.ca = make_ca(directory, "localhost")
        self.context.maximum_version = version
        self.resumed: list[bool] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.resumed.append(writer.get_extra_info("ssl_object").session_reused)
        try:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(OK)
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        writer.close()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Origin]:
        listener = await asyncio.start_server(self.serve, "127.0.0.1", 0, ssl=self.context)
        yield Origin("https", "localhost", listener.sockets[0].getsockname()[1], self.ca, True)
        listener.close()


@asynccontextmanager
async def gateway() -> AsyncIterator[Context]:
    context = Context(TaskOwner("test"))
    yield context
    await context.close()
    await context.tasks.close()


async def call(context: Context, origin: Origin) -> None:
    answer = await fetch(context.pool, origin, b"GET", b"/", b"host: h\r\n", b"", timeout_s=5, max_bytes=10)
    assert answer.body == b"ok"


def run(loop: Callable[[], asyncio.AbstractEventLoop], scenario: Callable[[], object]) -> None:
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(scenario())  # type: ignore[arg-type]


@LOOPS
@VERSIONS
def test_the_second_connection_resumes(
    tmp_path: Path, loop: Callable[[], asyncio.AbstractEventLoop], version: ssl.TLSVersion
) -> None:
    async def scenario() -> None:
        server = Server(tmp_path, version)
        async with server.running() as origin, gateway() as context:
            for _ in range(3):
                await call(context, origin)
        assert server.resumed == [False, True, True]

    run(loop, scenario)


@LOOPS
def test_a_server_that_knows_no_such_session_is_a_whole_handshake(
    tmp_path: Path, loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    async def scenario() -> None:
        first, second = Server(tmp_path, ssl.TLSVersion.TLSv1_3), Server(tmp_path, ssl.TLSVersion.TLSv1_3)
        second.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        first.context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
        second.context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
        first.ca = second.ca
        async with first.running() as one, second.running() as other, gateway() as context:
            await call(context, one)
            await call(context, other)
            await call(context, other)
        assert second.resumed == [False, True], "its own session took the place of the other's"

    run(loop, scenario)


@LOOPS
def test_a_session_is_no_pass_where_the_certificate_is_not_trusted(
    tmp_path: Path, loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """What one provider's bundle let in says nothing to another's."""

    async def scenario() -> None:
        server = Server(tmp_path, ssl.TLSVersion.TLSv1_3)
        async with server.running() as origin, gateway() as context:
            await call(context, origin)
            stranger = Origin("https", origin.host, origin.port, "", True)
            with pytest.raises(CortexError, match="cannot be reached"):
                await call(context, stranger)

    run(loop, scenario)


def test_the_certificate_is_looked_at_again_after_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often the session was resumed meanwhile."""
    now = 0.0
    monkeypatch.setattr(tls, "monotonic", lambda: now)

    async def scenario() -> None:
        nonlocal now
        server = Server(tmp_path, ssl.TLSVersion.TLSv1_3)
        async with server.running() as origin, gateway() as context:
            for at in (0.0, 0.9 * tls.KEEP_S, 1.1 * tls.KEEP_S, 1.9 * tls.KEEP_S):
                now = at
                await call(context, origin)
        assert server.resumed == [False, True, False, True]

    run(uvloop.new_event_loop, scenario)


def test_as_strict_as_the_standard_context() -> None:
    ours, standard = tls.ClientContext.trusting(""), ssl.create_default_context()
    for name in ("verify_mode", "check_hostname", "verify_flags", "minimum_version", "options"):
        assert getattr(ours, name) == getattr(standard, name)
    assert ours.cert_store_stats() == standard.cert_store_stats()
    with pytest.raises((ssl.SSLError, ValueError)):
        tls.ClientContext.trusting("nonsense")
