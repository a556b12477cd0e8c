from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.errors import Code, CortexError
from broker.host.systemd import Notifier, feed_watchdog, listen_fds


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.setblocking(False)
        yield sock


def env_of(manager: socket.socket, **more: str) -> dict[str, str]:
    return {"NOTIFY_SOCKET": manager.getsockname(), **more}


def test_states_are_told(manager: socket.socket) -> None:
    env = env_of(manager)
    notifier = Notifier(env)
    assert env == {}
    notifier.ready("3 sessions\nREADY=0")
    assert manager.recv(999) == b"READY=1\nSTATUS=3 sessions READY=0"
    notifier.reloading()
    first, second = manager.recv(999).split(b"\n")
    assert first == b"RELOADING=1"
    assert second.startswith(b"MONOTONIC_USEC=")
    notifier.status("x")
    assert manager.recv(999) == b"STATUS=x"
    notifier.stopping()
    assert manager.recv(999) == b"STOPPING=1"


def test_an_abstract_address() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        name = f"cortex-test-{os.getpid()}"
        sock.bind("\0" + name)
        Notifier({"NOTIFY_SOCKET": "@" + name}).alive()
        assert sock.recv(99) == b"WATCHDOG=1"


def test_nothing_happens_without_a_manager_or_when_it_went_away(tmp_path: Path) -> None:
    absent = Notifier({})
    assert not absent.present
    assert absent.watchdog_s is None
    absent.ready()
    Notifier({"NOTIFY_SOCKET": str(tmp_path / "gone")}).ready()


def test_the_watchdog_is_for_one_process_only(manager: socket.socket) -> None:
    assert Notifier(env_of(manager, WATCHDOG_USEC="3000000")).watchdog_s == 3.0
    assert Notifier(env_of(manager, WATCHDOG_USEC="3000000", WATCHDOG_PID=str(os.getpid()))).watchdog_s == 3.0
    assert Notifier(env_of(manager, WATCHDOG_USEC="3000000", WATCHDOG_PID="1")).watchdog_s is None


async def test_the_watchdog_is_fed_only_while_healthy(manager: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    sick, asked = False, asyncio.Event()

    def healthy() -> bool:
        asked.set()
        return not sick

    task = loop.create_task(feed_watchdog(Notifier(env_of(manager, WATCHDOG_USEC="20000")), healthy))
    assert await asyncio.wait_for(loop.sock_recv(manager, 99), 5) == b"WATCHDOG=1"
    sick = True
    asked.clear()
    await asyncio.wait_for(asked.wait(), 5)
    while True:
        try:
            manager.recv(99)
        except BlockingIOError:
            break
    asked.clear()
    await asyncio.wait_for(asked.wait(), 5)
    with pytest.raises(BlockingIOError):
        manager.recv(99)
    task.cancel()
    await asyncio.wait([task])
    await feed_watchdog(Notifier({}), healthy)


@pytest.fixture
def passed() -> Iterator[int]:
    """Two inherited sockets at consecutive descriptors; yields the first."""
    first = 200
    with socket.socket() as one, socket.socket(socket.AF_UNIX) as two:
        os.dup2(one.fileno(), first)
        os.dup2(two.fileno(), first + 1)
    yield first
    for fd in (first, first + 1):
        try:
            os.close(fd)
        except OSError:
            continue


def test_inherited_sockets_by_name(passed: int) -> None:
    env = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "2", "LISTEN_FDNAMES": "front:control", "X": "y"}
    found = listen_fds(env, passed)
    assert env == {"X": "y"}
    assert {name: [sock.family for sock in socks] for name, socks in found.items()} == {
        "front": [socket.AF_INET],
        "control": [socket.AF_UNIX],
    }
    for socks in found.values():
        assert not os.get_inheritable(socks[0].fileno())
        assert not socks[0].getblocking()
        socks[0].close()


def test_sockets_for_another_process_are_left_alone(passed: int) -> None:
    assert listen_fds({"LISTEN_PID": "1", "LISTEN_FDS": "2"}, passed) == {}
    assert listen_fds({}, passed) == {}


def test_what_is_not_a_socket_is_an_error() -> None:
    fd = os.open("/dev/null", os.O_RDONLY)
    try:
        with pytest.raises(CortexError) as caught:
            listen_fds({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}, fd)
        assert caught.value.code is Code.BAD_CONFIG
    finally:
        os.close(fd)
