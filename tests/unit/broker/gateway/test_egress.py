"""The way out of a slot, over its real sockets, with a name server that says what it is told to."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from broker.gateway import resolve
from broker.gateway.context import Context
from broker.gateway.messages import Egress, Settings, SlotEntry
from broker.gateway.orders import Orders
from broker.gateway.table import SlotState, Table
from broker.host.tasks import TaskOwner

ME = {"user": "ann", "workspace": "main"}


class Outside:
    """A slot, the one server it may want, and what its name leads to."""

    def __init__(self, directory: Path) -> None:
        self.addresses: list[str] = []
        self.reached = 0
        self.told: list[dict[str, Any]] = []
        self.path = directory / "egress"
        self.tasks = TaskOwner("test")
        self.context = Context(self.tasks, Settings(connect_timeout_s=0.2))
        self.context.report = self._report

    async def open(self) -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.reached += 1
            while await reader.read(65_536):
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
            writer.close()

        self.server = await asyncio.start_server(serve, "127.0.0.1", 0)
        self.port = self.server.sockets[0].getsockname()[1]
        self.state = SlotState(self.entry(), self.context)
        listeners = []
        for path in (self.path.with_name("gateway"), self.path):
            sock = socket.socket(socket.AF_UNIX)
            sock.bind(str(path))
            sock.listen()
            listeners.append(sock)
        self.state.listen(*listeners)

    def entry(self, *, private: tuple[str, ...] = (), hosts: tuple[str, ...] = ("shop.example",)) -> SlotEntry:
        return SlotEntry("a", 1, ME, egress=Egress(tuple(f"{host}:{self.port}" for host in hosts), private))

    def _report(self, facts: dict[str, Any]) -> bool:
        self.told += facts["hosts"]
        return True

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_unix_connection(str(self.path))

    async def asked(self, raw: str) -> str:
        """The status line that a request is answered with."""
        reader, writer = await self.connect()
        writer.write(raw.replace("HOST", f"shop.example:{self.port}").encode())
        line = await asyncio.wait_for(reader.readline(), 5)
        writer.close()
        return line.decode().strip()

    async def close(self) -> None:
        self.state.drop()
        await self.context.close()
        await self.tasks.close()
        self.server.close()


@pytest.fixture
async def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Outside]:
    made = Outside(tmp_path)
    monkeypatch.setattr(resolve, "_getaddrinfo", lambda host: list(made.addresses))
    monkeypatch.setattr(resolve, "TTL_S", 0.0)
    await made.open()
    yield made
    await made.close()


TUNNEL = "CONNECT HOST HTTP/1.1\r\nHost: x\r\n\r\n"
PLAIN = "GET http://HOST/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize("request_", [TUNNEL, PLAIN])
async def test_a_name_that_flips_to_a_private_address_is_refused(outside: Outside, request_: str) -> None:
    outside.addresses = ["192.0.2.1"]
    assert "(egress.address_refused)" in await outside.asked(request_), "documentation's own, so not public"
    # One that leads out, though nobody answers there, is let pass.
    outside.addresses = ["240.0.0.1", "9.9.9.9"]
    outside.context.settings = replace(outside.context.settings, connect_timeout_s=0.01)
    assert "502" in await outside.asked(request_)
    for private in ("127.0.0.1", "::ffff:127.0.0.1", "169.254.169.254", "10.1.2.3", "fd00::1", "64:ff9b::7f00:1"):
        outside.addresses = [private]
        assert "(egress.address_refused)" in await outside.asked(request_), private
    assert outside.reached == 0
    outside.state.out.flush()
    (row,) = outside.told
    assert (row["allowed"], row["refused_address"], row["denied"]) == (1, 7, 0)


async def test_of_several_addresses_only_those_that_pass_are_dialled(outside: Outside) -> None:
    outside.addresses = ["169.254.169.254", "127.0.0.1"]
    outside.state.update(outside.entry(private=("shop.example",)))
    assert "200" in await outside.asked(TUNNEL)
    assert outside.reached == 1


async def test_a_connection_of_when_the_address_was_allowed_is_not_used_again(outside: Outside) -> None:
    outside.addresses = ["127.0.0.1"]
    outside.state.update(outside.entry(private=("shop.example",)))
    assert "200" in await outside.asked(PLAIN)
    outside.state.update(outside.entry())
    assert "(egress.address_refused)" in await outside.asked(PLAIN)
    assert outside.reached == 1


async def test_a_tunnel_that_is_still_dialled_is_cut_too(outside: Outside, monkeypatch: pytest.MonkeyPatch) -> None:
    hanging = threading.Event()
    monkeypatch.setattr(resolve, "_getaddrinfo", lambda host: hanging.wait(10))
    reader, writer = await outside.connect()
    writer.write(TUNNEL.replace("HOST", f"shop.example:{outside.port}").encode())
    while not outside.state.out._flows:
        await asyncio.sleep(0)
    outside.state.update(outside.entry(hosts=("other.example",)))
    assert await asyncio.wait_for(reader.read(), 5) == b""
    assert not outside.state.out._flows
    assert outside.state.out._tunnels == 0
    hanging.set()
    writer.close()


@pytest.mark.parametrize("request_", [TUNNEL, PLAIN])
@pytest.mark.parametrize("private", [False, True])
async def test_a_sandbox_whose_names_are_slow_is_told_and_holds_up_no_provider(
    outside: Outside, monkeypatch: pytest.MonkeyPatch, request_: str, private: bool
) -> None:
    hanging = threading.Event()
    monkeypatch.setattr(resolve, "_getaddrinfo", lambda host: hanging.wait(10) and ["127.0.0.1"])
    wild = ("*.shop.example",)
    outside.state.update(outside.entry(hosts=wild, private=wild if private else ()))
    asked = []
    for number in range(resolve.MAX_OF_ONE + 1):
        name = f"n{number}.shop.example:{outside.port}"
        asked.append(asyncio.ensure_future(outside.asked(request_.replace("HOST", name))))
    done, _ = await asyncio.wait(asked, timeout=5, return_when=asyncio.FIRST_COMPLETED)
    (refused,) = done
    assert "429" in refused.result()
    assert "(egress.limit)" in refused.result()
    operators, guests = outside.context._resolvers
    assert (len(operators._pending), len(guests._pending)) == (0, resolve.MAX_OF_ONE)
    hanging.set()
    await asyncio.gather(*asked)


async def test_what_could_not_be_told_is_told_later(outside: Outside) -> None:
    outside.context.report = lambda _: False
    assert "403" in await outside.asked(TUNNEL.replace("HOST", "evil.example:443"))
    outside.state.out.flush()
    outside.context.report = outside._report
    assert "403" in await outside.asked(TUNNEL.replace("HOST", "evil.example:443"))
    outside.state.out.flush()
    assert [row["denied"] for row in outside.told] == [2]


async def test_a_slot_that_is_another_users_begins_anew(outside: Outside) -> None:
    outside.context.settings = replace(outside.context.settings, egress_bytes_per_hour=10)
    outside.addresses = ["127.0.0.1"]
    outside.state.update(outside.entry(private=("shop.example",)))
    assert "200" in await outside.asked(PLAIN)
    assert "429" in await outside.asked(PLAIN)
    theirs = replace(outside.entry(private=("shop.example",)), identity={"user": "bob", "workspace": "main"})
    outside.state.update(theirs)
    assert sum(row["limited"] for row in outside.told) == 2, "ann's, told as ann's"
    assert "200" in await outside.asked(PLAIN)


async def test_what_was_moved_is_not_forgotten_with_a_change_of_settings(outside: Outside) -> None:
    outside.context.settings = replace(outside.context.settings, egress_bytes_per_hour=10)
    outside.addresses = ["127.0.0.1"]
    outside.state.update(outside.entry(private=("shop.example",)))
    assert "200" in await outside.asked(PLAIN)
    other = {**ME, "agent": "another", "team": "red", "session": "2"}
    outside.state.update(replace(outside.entry(private=("shop.example",)), identity=other))
    assert "429" in await outside.asked(PLAIN)


async def test_without_a_broker_nothing_counts_as_told(outside: Outside, tmp_path: Path) -> None:
    Orders(tmp_path / "nobody", Table(outside.context), outside.context)
    assert outside.context.report({"kind": "egress"}) is False
