"""Asking a (hostile) broker for journal files, over real sockets with real descriptors."""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sandbox_agent import journal_link
from sandbox_agent.wire import codec
from sandbox_agent.wire.codec import WireError
from sandbox_agent.wire.messages import Grant, Preamble

GRANT = codec.pack(Grant(segment=3, first=1, last=3).encode())


class Broker:
    """Listens on a Unix socket; ``answer`` is what one connection gets."""

    def __init__(self, directory: Path) -> None:
        self.path = str(directory / "agent")
        self.asked: list[Preamble] = []
        self.answer: Callable[[socket.socket], None] = lambda sock: None
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            with sock:
                [asked] = codec.Decoder().feed(sock.recv(4096))
                self.asked.append(Preamble.decode(asked))
                self.answer(sock)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    made = Broker(tmp_path)
    yield made
    made.close()


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "segment", os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    yield fd
    os.close(fd)


def descriptors() -> list[str]:
    """What is open of the files that a test's broker gives away."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{number}"))
        except OSError:
            continue
    return sorted(path for path in found if path.endswith(("/segment", "/plain")))


def test_a_grant_brings_one_descriptor_that_no_child_inherits(broker: Broker, file: int) -> None:
    broker.answer = lambda sock: void(socket.send_fds(sock, [GRANT], [file]))
    fd, grant = journal_link.ask(broker.path, b"secret", 3)
    assert broker.asked == [Preamble(kind="journal", version=codec.VERSION, secret=b"secret", segment=3)]
    assert (grant.segment, grant.first, grant.last) == (3, 1, 3)
    assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    os.write(fd, b"x")
    assert os.pread(file, 10, 0) == b"x"
    os.close(fd)


def void(_value: object) -> None:
    return None


def test_a_grant_in_pieces_is_put_together(broker: Broker, file: int) -> None:
    def pieces(sock: socket.socket) -> None:
        socket.send_fds(sock, [GRANT[:5]], [file])
        for byte in GRANT[5:]:
            sock.sendall(bytes([byte]))

    broker.answer = pieces
    fd, grant = journal_link.ask(broker.path, b"", -1)
    assert grant.segment == 3
    os.close(fd)


def test_a_refusal_is_an_end_of_file(broker: Broker) -> None:
    with pytest.raises((EOFError, ConnectionResetError)):
        journal_link.ask(broker.path, b"", 0)


def test_silence_ends_in_time(broker: Broker) -> None:
    done = threading.Event()
    broker.answer = lambda sock: void(done.wait(5))
    with pytest.raises(TimeoutError):
        journal_link.ask(broker.path, b"", 0, timeout_s=0.1)
    done.set()


@pytest.mark.parametrize("many", [0, 2, 3, 40])
def test_any_other_number_of_descriptors_is_refused_and_none_stays_open(broker: Broker, file: int, many: int) -> None:
    before = descriptors()
    broker.answer = lambda sock: void(socket.send_fds(sock, [GRANT], [file] * many))
    with pytest.raises(WireError):
        journal_link.ask(broker.path, b"", 0)
    assert descriptors() == before


def test_what_is_no_file_to_append_to_is_refused(broker: Broker, tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    plain = os.open(tmp_path / "plain", os.O_RDWR | os.O_CREAT, 0o600)
    with ours, theirs:
        for fd in (ours.fileno(), plain):
            broker.answer = lambda sock, fd=fd: void(socket.send_fds(sock, [GRANT], [fd]))  # type: ignore[misc]
            before = descriptors()
            with pytest.raises(WireError):
                journal_link.ask(broker.path, b"", 0)
            assert descriptors() == before
    os.close(plain)


def test_garbage_is_refused(broker: Broker, file: int) -> None:
    for garbage in (b"\xff\xff\xff\xff", b"\0\0\0\1\xc0", codec.pack({"t": "grant", "segment": "x"})):
        broker.answer = lambda sock, data=garbage: void(socket.send_fds(sock, [data], [file]))  # type: ignore[misc]
        before = descriptors()
        with pytest.raises(WireError):
            journal_link.ask(broker.path, b"", 0)
        assert descriptors() == before


async def test_the_granter_does_not_block_the_loop_and_leaves_nothing_open_when_cancelled(
    broker: Broker, file: int
) -> None:
    release = threading.Event()

    def late(sock: socket.socket) -> None:
        release.wait(5)
        socket.send_fds(sock, [GRANT], [file])

    broker.answer = late
    grant = journal_link.granter(lambda: broker.path, lambda: b"s")
    before = descriptors()
    asking = asyncio.ensure_future(grant(0))
    await asyncio.sleep(0.05)
    assert not asking.done()
    asking.cancel()
    await asyncio.wait([asking])
    release.set()
    async with asyncio.timeout(5):
        while len(descriptors()) > len(before):
            await asyncio.sleep(0.01)
    broker.answer = lambda sock: void(socket.send_fds(sock, [GRANT], [file]))
    fd, _ = await grant(1)
    os.close(fd)
    assert broker.asked[-1].segment == 1
