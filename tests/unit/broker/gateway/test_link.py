"""The broker's side of the link against peers that are no gateway, or a strange one."""

from __future__ import annotations

import asyncio
import json
import os
import pwd
import shutil
import socket
import stat
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from broker.config import GatewayConfig
from broker.errors import Code, CortexError
from broker.gateway import link as link_module
from broker.gateway.link import Egress, GatewayLink
from broker.gateway.messages import MAX_PACKET, VERSION, SlotEntry, entry_to_wire, pack
from broker.gateway.policy import CacheStore, Policy
from broker.host.tasks import TaskOwner
from broker.metrics import GATEWAY_EVENTS


class Peer:
    """A hand-driven gateway."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.connect(str(path))
        self.sock.setblocking(False)

    async def say(self, message: dict[str, Any] | bytes) -> None:
        packet = message if isinstance(message, bytes) else json.dumps(message).encode()
        await asyncio.get_running_loop().sock_sendall(self.sock, packet)

    async def hear(self) -> dict[str, Any]:
        """The next message; {} at the end."""
        try:
            packet = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(self.sock, 2**18), 5)
        except ConnectionResetError:
            return {}
        return json.loads(packet) if packet else {}

    async def greet(self) -> list[dict[str, Any]]:
        """Says hello and acknowledges all until the link is content; what was told."""
        await self.say({"type": "hello", "version": VERSION, "pid": 1})
        heard = []
        while True:
            message = await self.hear()
            heard.append(message)
            await self.say({"type": "ack", "id": message["id"], "stats": {"requests": 3}})
            if message["type"] == "ping":
                return heard

    def close(self) -> None:
        self.sock.close()


@pytest.fixture
async def link() -> AsyncIterator[GatewayLink]:
    directory = Path(tempfile.mkdtemp(prefix="gw"))
    tasks = TaskOwner("test")
    made = GatewayLink(directory / "run" / "gw.sock", tasks, settings=GatewayConfig)
    await made.start()
    yield made
    await made.close()
    await tasks.close()
    shutil.rmtree(directory)


def slot_fds() -> tuple[list[socket.socket], tuple[int, int]]:
    pair = list(socket.socketpair())
    return pair, (pair[0].fileno(), pair[1].fileno())


async def test_the_socket_is_for_its_owner_only(link: GatewayLink) -> None:
    assert stat.S_IMODE(os.stat(link.path).st_mode) == 0o600
    assert os.listdir(link.path.parent) == [link.path.name]


OTHER = "nobody"
HELLO = """
import os, socket, sys
os.setgid(int(sys.argv[2])), os.setgroups([]), os.setuid(int(sys.argv[3]))
peer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
peer.connect(sys.argv[1])
try:
    peer.send(b'{"type": "hello", "version": %s, "pid": 1}' % sys.argv[4].encode())
    print("heard" if peer.recv(2**18) else "sent away")
except ConnectionError:
    print("sent away")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
@pytest.mark.parametrize(("user", "answer"), [("", "sent away"), (OTHER, "heard")])
async def test_a_gateway_of_another_user_is_one_only_where_that_is_said(user: str, answer: str) -> None:
    """As the shipped units have it: the broker's socket is its group's, and the gateway is in that group."""
    directory = Path(tempfile.mkdtemp(prefix="gw"))
    directory.chmod(0o750)
    tasks = TaskOwner("test")
    link = GatewayLink(directory / "gw.sock", tasks, settings=lambda: GatewayConfig(user=user))
    await link.start()
    if not user:
        link.path.chmod(0o660)
    peer = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", HELLO, str(link.path), "0", str(pwd.getpwnam(OTHER).pw_uid), str(VERSION)),
        stdout=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(10):
        said, _ = await peer.communicate()
    assert said.decode().strip() == answer
    await link.close()
    await tasks.close()
    shutil.rmtree(directory)


async def test_a_user_that_does_not_exist_is_said(tmp_path: Path) -> None:
    tasks = TaskOwner("test")
    link = GatewayLink(tmp_path / "gw.sock", tasks, settings=lambda: GatewayConfig(user="no-such-user"))
    with pytest.raises(CortexError, match="no-such-user") as caught:
        await link.start()
    assert "gateway.user" in caught.value.hint
    await tasks.close()


@pytest.mark.parametrize(
    "garbage", [b"\xff\x00", b"[]", b'{"type":1}', b"x" * 100_000, b'{"type":"hello","version":0}']
)
async def test_garbage_ends_that_connection_and_the_next_is_served(link: GatewayLink, garbage: bytes) -> None:
    peer = Peer(link.path)
    await peer.say(garbage)
    assert await peer.hear() == {}
    peer.close()
    good = Peer(link.path)
    told = await good.greet()
    await link.wait_connected(5)
    assert [message["type"] for message in told] == ["settings", "policies", "ping"]
    good.close()


async def test_a_policy_that_is_too_large_stands_in_nobodys_way(link: GatewayLink) -> None:
    small = Policy(kind="openai", upstreams=("http://h",))
    large = Policy(kind="openai", upstreams=("http://h",), max_fails=7, ca="x" * MAX_PACKET)
    link.set_policies({"large": large, "small": small}, CacheStore())
    peer = Peer(link.path)
    told = await peer.greet()
    await link.wait_connected(5)
    assert [message["type"] for message in told] == ["settings", "policy", "policy", "policies", "ping"]
    policy = told[1]["policy"]
    assert (told[1]["name"], policy["max_fails"]) == ("large", 7), "its limits hold"
    assert policy["ca"] not in ("", large.ca), "and no server is trusted that the bundle might not name"
    peer.close()


async def test_a_second_gateway_is_turned_away(link: GatewayLink) -> None:
    first = Peer(link.path)
    await first.greet()
    await link.wait_connected(5)
    second = Peer(link.path)
    assert await second.hear() == {}
    assert link.connected
    first.close()
    second.close()


async def test_no_gateway_is_an_error_in_time(link: GatewayLink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "ACK_TIMEOUT", 0.05)
    with pytest.raises(CortexError) as caught:
        await link.wait_connected(0.05)
    assert caught.value.code is Code.GATEWAY_DOWN
    pair, fds = slot_fds()
    for call in (link.put_slot("a", 1, None, {}, Egress(), fds), link.drop_slot("a")):
        with pytest.raises(CortexError) as caught:
            await call
        assert caught.value.code is Code.GATEWAY_DOWN
    # The drop stands, and is what the next gateway hears.
    peer = Peer(link.path)
    assert [message["type"] for message in await peer.greet()] == ["settings", "policies", "drop", "ping"]
    await link.wait_connected(5)
    assert link.health()["slots"] == 0
    peer.close()
    for sock in pair:
        sock.close()


async def test_a_window_bounds_what_is_under_way(link: GatewayLink) -> None:
    pair, fds = slot_fds()
    putting = [asyncio.ensure_future(link.put_slot(f"s{n}", 1, None, {}, Egress(), fds)) for n in range(100)]
    peer = Peer(link.path)
    await peer.say({"type": "hello", "version": VERSION, "pid": 1})
    unanswered = [await peer.hear() for _ in range(link_module.WINDOW)]
    with pytest.raises(BlockingIOError):
        peer.sock.recv(1)
    for message in unanswered:
        await peer.say({"type": "ack", "id": message["id"]})
    while not link.connected:
        message = await peer.hear()
        await peer.say({"type": "ack", "id": message["id"]})
        if message["type"] == "ping":
            await link.wait_connected(5)
    await asyncio.gather(*putting)
    peer.close()
    for sock in pair:
        sock.close()


async def test_what_the_gateway_counted_becomes_metrics(link: GatewayLink) -> None:
    before = GATEWAY_EVENTS.labels("requests")._value.get()
    peer = Peer(link.path)
    await peer.greet()
    await link.wait_connected(5)
    assert GATEWAY_EVENTS.labels("requests")._value.get() == before + 3
    assert link.health()["requests"] == 3
    peer.close()


async def test_a_path_that_is_too_long_is_told() -> None:
    tasks = TaskOwner("test")
    with pytest.raises(CortexError) as caught:
        await GatewayLink(Path("/tmp") / ("x" * 110), tasks, settings=GatewayConfig).start()
    assert caught.value.code is Code.BAD_CONFIG


async def test_a_slot_that_just_does_not_fit_is_refused_and_hides_no_other(link: GatewayLink) -> None:
    def egress(size: int) -> Egress:
        return Egress(("h" * size,))

    bare = len(pack(entry_to_wire(SlotEntry("big", 1, None, {}, egress(0)))))
    pair, fds = slot_fds()
    for spare in (0, 10, 20):
        with pytest.raises(CortexError) as caught:
            await link.put_slot("big", 1, None, {}, egress(MAX_PACKET - bare - spare), fds)
        assert caught.value.code is Code.BAD_CONFIG
    peer = Peer(link.path)
    assert [message["type"] for message in await peer.greet()] == ["settings", "policies", "ping"]
    await link.wait_connected(5)
    peer.close()
    for sock in pair:
        sock.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
async def test_a_process_of_another_user_is_no_gateway(link: GatewayLink) -> None:
    for path, mode in ((link.path, 0o666), (link.path.parent, 0o711), (link.path.parent.parent, 0o711)):
        path.chmod(mode)
    os.seteuid(65_534)
    try:
        stranger = Peer(link.path)
    finally:
        os.seteuid(0)
    assert await stranger.hear() == {}
    peer = Peer(link.path)
    await peer.greet()
    await link.wait_connected(5)
    peer.close()
    stranger.close()
