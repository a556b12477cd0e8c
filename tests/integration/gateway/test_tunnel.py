"""The egress socket: CONNECT and plain proxy requests, allowed, refused, private."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from broker.gateway.link import Egress
from tests.integration.gateway.support import (
    Rig,
    app_server,
    ask,
    client,
    echo,
    make_ca,
    problem,
    raw_server,
    rig,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared() -> AsyncIterator[Rig]:
    async with rig() as made:
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def gw(shared: Rig) -> AsyncIterator[Rig]:
    """The module's gateway, with a slot that is this test's own."""
    async with shared.own_slot():
        yield shared


async def mirror(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.write(b"bye")
    writer.write_eof()


RESULTS = ("allowed", "denied", "refused_address", "limited")


async def told(gw: Rig) -> list[dict[str, Any]]:
    """What the broker has heard of the slot's way out when it is cut off."""
    await gw.link.drop_slot(gw.slot)
    return [row for report in gw.reports if report["kind"] == "egress" for row in report["hosts"]]


def here(port: int) -> Egress:
    return Egress((f"localhost:{port}",), ("localhost",))


async def connect(path: Path, target: str, version: str = "1.1") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_unix_connection(str(path))
    host = f"Host: {target}\r\n" if version == "1.1" else ""
    writer.write(f"CONNECT {target} HTTP/{version}\r\n{host}\r\n".encode())
    assert (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)).startswith(b"HTTP/1.1 200 ")
    return reader, writer


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_bytes_pass_and_each_side_may_end_first(gw: Rig, version: str) -> None:
    async with raw_server(mirror) as port:
        slot = await gw.put(egress=here(port))
        reader, writer = await connect(slot.egress_path, f"localhost:{port}", version)
        body = os.urandom(3_000_000)
        sending = asyncio.ensure_future(_send(writer, body))
        assert await reader.readexactly(len(body)) == body
        await sending
        writer.write_eof()
        assert await asyncio.wait_for(reader.read(), 5) == b"bye"
        writer.close()


async def _send(writer: asyncio.StreamWriter, body: bytes) -> None:
    writer.write(body)
    await writer.drain()


async def test_bytes_sent_before_the_answer_are_not_lost(gw: Rig) -> None:
    async with raw_server(mirror) as port:
        slot = await gw.put(egress=here(port))
        raw = f"CONNECT localhost:{port} HTTP/1.1\r\nHost: x\r\n\r\nearly".encode()
        reader, writer = await asyncio.open_unix_connection(str(slot.egress_path))
        writer.write(raw)
        await reader.readuntil(b"\r\n\r\n")
        assert await reader.readexactly(5) == b"early"
        writer.close()


async def test_a_server_that_speaks_first_and_goes(gw: Rig) -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 hello")
        await writer.drain()

    async with raw_server(greet) as port:
        slot = await gw.put(egress=here(port))
        reader, writer = await connect(slot.egress_path, f"localhost:{port}")
        assert await asyncio.wait_for(reader.read(), 5) == b"220 hello"
        writer.close()


async def test_tls_goes_through_end_to_end(gw: Rig, tmp_path: Path) -> None:
    context, ca = make_ca(tmp_path, "localhost")
    async with app_server(echo, context) as port:
        slot = await gw.put(egress=here(port))
        reader, writer = await connect(slot.egress_path, f"localhost:{port}")
        await writer.start_tls(ssl.create_default_context(cadata=ca), server_hostname="localhost")
        writer.write(b"GET /x HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer mine\r\nConnection: close\r\n\r\n")
        assert b"Bearer mine" in await reader.read()
        writer.close()


@pytest.mark.parametrize(
    ("target", "code"),
    [
        ("evil.example:443", "egress.denied"),
        ("localhost:22", "egress.denied"),
        ("pkgs.example.evil.example:443", "egress.denied"),
        ("pkgs.example:80", "egress.denied"),
        ("[::1]:443", "egress.denied"),
        ("localhost:443", "egress.address_refused"),
        ("LOCALHOST.:443", "egress.address_refused"),
        ("127.0.0.1:443", "egress.address_refused"),
        ("169.254.169.254:443", "egress.address_refused"),
        ("[::ffff:10.0.0.1]:443", "egress.address_refused"),
        ("[64:ff9b::a00:1]:443", "egress.address_refused"),
        ("no-such-name.invalid:443", "gateway.upstream_unreachable"),
    ],
)
async def test_what_is_refused_and_why(gw: Rig, target: str, code: str) -> None:
    rules = ("pkgs.example", "localhost", "127.0.0.1", "169.254.169.254", "[::ffff:10.0.0.1]")
    slot = await gw.put(egress=Egress((*rules, "[64:ff9b::a00:1]", "no-such-name.invalid"), ()))
    response = await ask(slot.egress_path, f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n\x16\x03\x01".encode())
    got = problem(response)[1]
    assert got["code"] == code
    assert got["hint"]
    result = {"egress.denied": "denied", "egress.address_refused": "refused_address"}.get(code, "allowed")
    (row,) = await told(gw)
    assert {name for name in RESULTS if row[name]} == {result}
    assert f"{row['host']}:{row['port']}" == target.lower().replace("[", "").replace("]", "").replace(".:", ":")
    # What tools show of a proxy that refuses is its status line.
    status = response.partition(b"\r\n")[0].decode()
    assert status.endswith(f" ({code})")


async def test_link_local_is_refused_even_where_private_is_allowed(gw: Rig) -> None:
    slot = await gw.put(egress=Egress(("169.254.169.254:80",), ("169.254.169.254",)))
    for raw in (
        b"CONNECT 169.254.169.254:80 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET http://169.254.169.254/latest HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    ):
        assert problem(await ask(slot.egress_path, raw))[1]["code"] == "egress.address_refused"


async def test_unclaimed_and_dropped_slots_have_no_way_out(gw: Rig) -> None:
    async with raw_server(mirror) as port:
        slot = await gw.put(egress=here(port), identity=None)
        raw = f"CONNECT localhost:{port} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        assert problem(await ask(slot.egress_path, raw))[0] == 503
        await gw.put(egress=here(port))
        reader, writer = await connect(slot.egress_path, f"localhost:{port}")
        await gw.link.drop_slot(gw.slot)
        assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()


async def test_plain_requests_only_to_listed_ports(gw: Rig) -> None:
    async with app_server(echo) as port:
        slot = await gw.put(egress=Egress((f"localhost:{port}", "shop.example"), ("localhost",)))
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(path=str(slot.egress_path))) as http:
            # A Unix connector sends origin-form targets, so the absolute form is written by hand below.
            assert (await http.get("http://shop.example/simple")).status == 400
        head = f"GET http://localhost:{port}/a/../b?key=1 HTTP/1.1\r\nHost: x\r\nAuthorization: mine\r\n"
        raw = (head + "Proxy-Authorization: p\r\nConnection: close\r\n\r\n").encode()
        status, got = problem(await ask(slot.egress_path, raw))
        assert (status, got["path"]) == (200, "/a/../b?key=1")
        headers = {name.lower(): value for name, value in got["headers"]}
        assert headers["host"] == f"localhost:{port}"
        assert headers["authorization"] == "mine"
        assert "proxy-authorization" not in headers
        refused = b"GET http://shop.example/simple HTTP/1.1\r\nHost: shop.example\r\nConnection: close\r\n\r\n"
        status, got = problem(await ask(slot.egress_path, refused))
        assert (status, got["code"]) == (403, "egress.denied")
        assert "shop.example:80" in got["hint"]


async def test_the_gateway_socket_is_no_proxy(gw: Rig) -> None:
    slot = await gw.put(egress=Egress(("localhost",), ("localhost",)))
    raw = b"CONNECT localhost:443 HTTP/1.1\r\nHost: x\r\n\r\n"
    assert problem(await ask(slot.gateway_path, raw))[0] == 405
    async with client(slot.gateway_path) as http:
        assert (await http.get("/x")).status == 404


async def test_a_tunnel_on_which_nothing_moves_ends() -> None:
    async with rig(idle_timeout_s=1) as gw, raw_server(mirror) as port:
        slot = await gw.put(egress=here(port))
        reader, writer = await connect(slot.egress_path, f"localhost:{port}")
        assert await asyncio.wait_for(reader.read(), 10) == b""
        writer.close()


async def test_a_sandbox_that_does_not_read_holds_the_server_back(gw: Rig) -> None:
    sent = 0
    stuck = asyncio.Event()

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        while True:
            writer.write(b"x" * 100_000)
            sent += 100_000
            try:
                await asyncio.wait_for(writer.drain(), 1.0)
            except TimeoutError:
                stuck.set()
                return

    async with raw_server(flood) as port:
        slot = await gw.put(egress=here(port))
        _, writer = await connect(slot.egress_path, f"localhost:{port}")
        await asyncio.wait_for(stuck.wait(), 20)
        assert sent < 30_000_000
        writer.close()


async def test_bytes_and_the_tool_are_told_with_whose_they_are(gw: Rig) -> None:
    async with raw_server(mirror) as port:
        slot = await gw.put(egress=here(port))
        reader, writer = await asyncio.open_unix_connection(str(slot.egress_path))
        writer.write(f"CONNECT localhost:{port} HTTP/1.1\r\nHost: x\r\nUser-Agent: git/2.39.5\r\n\r\n".encode())
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"x" * 70_000)
        await reader.readexactly(70_000)
        (row,) = await told(gw)
        assert row == {
            "host": "localhost",
            "port": port,
            "tool": "git",
            "sent": 70_000,
            "received": 70_000,
            "allowed": 1,
            "denied": 0,
            "refused_address": 0,
            "limited": 0,
            "last": "allowed",
        }
        assert [(report["user"], report["workspace"]) for report in gw.reports] == [("u1", "main")]
        writer.close()


async def test_plain_requests_are_told_too(gw: Rig) -> None:
    async with app_server(echo) as port:
        slot = await gw.put(egress=here(port))
        head = (
            f"POST http://localhost:{port}/ HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello"
        )
        response = await ask(slot.egress_path, head.encode())
        (row,) = await told(gw)
        assert (row["allowed"], row["sent"], row["received"]) == (1, 5, len(response))


async def test_a_host_that_is_allowed_no_longer_loses_its_connections(gw: Rig) -> None:
    async with raw_server(mirror) as port, raw_server(mirror) as other:
        both = Egress((f"localhost:{port}", f"localhost:{other}"), ("localhost",))
        slot = await gw.put(egress=both)
        reader, writer = await connect(slot.egress_path, f"localhost:{port}")
        kept, keeping = await connect(slot.egress_path, f"localhost:{other}")
        await gw.put(egress=here(other))
        assert await asyncio.wait_for(reader.read(), 5) == b""
        keeping.write(b"still")
        assert await kept.readexactly(5) == b"still"
        # Still listed, but its private address is no longer one for it.
        await gw.put(egress=Egress((f"localhost:{other}",), ()))
        assert await asyncio.wait_for(kept.read(), 5) == b""
        writer.close()
        keeping.close()


async def test_tunnels_at_once_are_limited() -> None:
    async with rig(max_tunnels_per_sandbox=2) as gw, raw_server(mirror) as port:
        slot = await gw.put(egress=here(port))
        raw = f"CONNECT localhost:{port} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        held = [await connect(slot.egress_path, f"localhost:{port}") for _ in range(2)]
        status, got = problem(await ask(slot.egress_path, raw))
        assert (status, got["code"]) == (429, "egress.limit")
        assert "max_tunnels_per_sandbox" in got["hint"]
        held[0][1].write_eof()
        assert await asyncio.wait_for(held[0][0].read(), 5) == b"bye"
        held[0][1].close()
        reader, writer = await connect(slot.egress_path, f"localhost:{port}")
        writer.write(b"again")
        assert await reader.readexactly(5) == b"again"
        (row,) = await told(gw)
        assert (row["allowed"], row["limited"]) == (3, 1)
        for _, each in (*held, (reader, writer)):
            each.close()


async def test_bytes_an_hour_are_limited() -> None:
    async with rig(egress_bytes_per_hour=100_000) as gw, raw_server(mirror) as port, app_server(echo) as web:
        slot = await gw.put(egress=Egress((f"localhost:{port}", f"localhost:{web}"), ("localhost",)))
        reader, writer = await connect(slot.egress_path, f"localhost:{port}")
        writer.write(b"x" * 40_000)
        assert len(await reader.readexactly(40_000)) == 40_000
        writer.write(b"x" * 40_000)
        assert len(await asyncio.wait_for(_all(reader), 5)) < 40_000
        raw = f"CONNECT localhost:{port} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        plain = f"GET http://localhost:{web}/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
        for request in (raw, plain):
            response = await ask(slot.egress_path, request)
            status, got = problem(response)
            assert (status, got["code"]) == (429, "egress.limit")
            assert b"retry-after: 3" in response, "an hour, less what has passed of its first minute"
        # Others are not held to what this one has used.
        await gw.put(egress=here(web), identity={"user": "u2", "workspace": "main"})
        assert (await ask(slot.egress_path, plain)).startswith(b"HTTP/1.1 200")
        writer.close()


async def _all(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read()
    except ConnectionError:
        return b""
