"""A real gateway process with real slot sockets, and servers for it to talk to."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import json
import os
import shutil
import socket
import ssl
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from broker.config import GatewayConfig
from broker.gateway.child import GatewayChild
from broker.gateway.link import Egress, GatewayLink, Provider
from broker.host.tasks import TaskOwner

KEY = "sk-real-0123456789abcdef"
ME = {"user": "u1", "workspace": "main", "session": "s1"}
NOWHERE = Egress()
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class SlotSockets:
    """The two listeners of a slot, as the broker makes them."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.gateway_path = directory / "gateway"
        self.egress_path = directory / "egress"
        self._socks = [self._bind(self.gateway_path), self._bind(self.egress_path)]

    @staticmethod
    def _bind(path: Path) -> socket.socket:
        path.unlink(missing_ok=True)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.bind(str(path))
        sock.listen(128)
        return sock

    @property
    def fds(self) -> tuple[int, int]:
        return self._socks[0].fileno(), self._socks[1].fileno()

    def close(self) -> None:
        for sock in self._socks:
            sock.close()


class Rig:
    """One broker side and its gateway process."""

    def __init__(self, directory: Path, config: GatewayConfig) -> None:
        self.directory = directory
        self.config = config
        self.reports: list[dict[str, Any]] = []
        self.slots: dict[str, SlotSockets] = {}
        self.slot = "a"
        self._fresh()

    def _fresh(self) -> None:
        self.tasks = TaskOwner("test")
        self.link = GatewayLink(
            self.directory / "gw.sock", self.tasks, settings=lambda: self.config, on_report=self._heard
        )
        self.child = GatewayChild(self.link, self.tasks, log_level="debug", log_format="json")

    def _heard(self, facts: dict[str, Any]) -> None:
        self.reports.append(facts)
        if facts["kind"] == "usage":
            self.link.usage_seen(facts["boot"], facts["upto"])

    async def start(self) -> None:
        await self.link.start()
        await self.child.start()
        await self.link.wait_connected(10)

    async def stop(self) -> None:
        await self.child.stop(1.0)
        await self.link.close()
        await self.tasks.close()
        for slot in self.slots.values():
            slot.close()

    async def lose_broker(self) -> None:
        """As if the broker were killed: the link and its held listeners go, the gateway stays."""
        await self.link.close()
        await self.tasks.close()
        for slot in self.slots.values():
            slot.close()

    async def new_broker(self) -> None:
        """The next broker on the same state."""
        self._fresh()
        self.slots = {name: SlotSockets(self.directory / name) for name in self.slots}
        await self.link.start()
        await self.child.start()
        await self.link.wait_connected(10)

    @asynccontextmanager
    async def own_slot(self) -> AsyncIterator[None]:
        """Another name for the slot that ``put`` means, until the end."""
        self.slot = f"slot{int(self.slot.removeprefix('slot')) + 1 if self.slot != 'a' else 1}"
        self.reports.clear()
        yield
        await self.link.drop_slot(self.slot)
        if self.slot in self.slots:
            self.slots.pop(self.slot).close()

    async def put(
        self,
        providers: dict[str, Provider] | None = None,
        egress: Egress = NOWHERE,
        *,
        slot: str = "",
        incarnation: int = 1,
        identity: dict[str, str] | None = ME,
    ) -> SlotSockets:
        slot = slot or self.slot
        sockets = self.slots.get(slot)
        if sockets is None:
            sockets = self.slots[slot] = SlotSockets(self.directory / slot)
        await self.link.put_slot(slot, incarnation, identity, providers or {}, egress, sockets.fds)
        return sockets


@asynccontextmanager
async def rig(make: type[Rig] = Rig, **settings: Any) -> AsyncIterator[Rig]:
    directory = Path(tempfile.mkdtemp(prefix="gw"))
    made = make(directory, GatewayConfig(**settings))
    try:
        await made.start()
        yield made
    finally:
        await made.stop()
        shutil.rmtree(directory)


@asynccontextmanager
async def raw_server(handler: Handler, tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """A server that does what ``handler`` does; gives its port."""
    running: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        running.add(task)
        try:
            await handler(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError, ssl.SSLError):
            pass
        finally:
            running.discard(task)
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in list(running):
            task.cancel()
        if running:
            await asyncio.wait(list(running), timeout=2)


@asynccontextmanager
async def app_server(
    handler: Callable[[web.Request], Awaitable[web.StreamResponse]], tls: ssl.SSLContext | None = None
) -> AsyncIterator[int]:
    """A server that is not ours (aiohttp), all paths and methods to ``handler``; gives its port."""
    app = web.Application(client_max_size=2**30)
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
    await site.start()
    try:
        assert runner.addresses
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


async def echo(request: web.Request) -> web.StreamResponse:
    """Answers what it got, as JSON."""
    body = await request.read()
    facts = {
        "method": request.method,
        "path": request.raw_path,
        "headers": [[name, value] for name, value in request.headers.items()],
        "body": body.decode("latin-1"),
    }
    return web.json_response(facts, headers={"Set-Cookie": "a=b", "X-Kept": "yes"})


@asynccontextmanager
async def client(path: Path) -> AsyncIterator[aiohttp.ClientSession]:
    """A client on a Unix socket that is not ours (aiohttp)."""
    connector = aiohttp.UnixConnector(path=str(path))
    timeout = aiohttp.ClientTimeout(total=20)
    async with aiohttp.ClientSession("http://127.0.0.1", connector=connector, timeout=timeout) as session:
        yield session


async def ask(path: Path | str, raw: bytes, *, eof: bool = False) -> bytes:
    """All that comes back for ``raw`` until the other side closes."""
    reader, writer = await asyncio.open_unix_connection(str(path))
    try:
        writer.write(raw)
        if eof:
            writer.write_eof()
        return await asyncio.wait_for(reader.read(), 10)
    finally:
        writer.close()


def problem(response: bytes) -> tuple[int, dict[str, Any]]:
    """Status and JSON body of one raw response."""
    head, _, body = response.partition(b"\r\n\r\n")
    return int(head.split(b" ", 2)[1]), json.loads(body)


def make_ca(directory: Path, *names: str) -> tuple[ssl.SSLContext, str]:
    """A server's TLS context and the PEM bundle that trusts it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    alternatives: list[x509.GeneralName] = [
        x509.IPAddress(ipaddress.ip_address(each)) if each[0].isdigit() else x509.DNSName(each) for each in names
    ]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    files = directory / "cert.pem", directory / "key.pem"
    files[0].write_bytes(pem)
    files[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    os.chmod(files[1], 0o600)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*files)
    return context, pem.decode()
