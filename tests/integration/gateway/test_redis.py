"""Answers in a real Redis that dies, hangs, comes back, refuses, and holds what is no answer."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from broker.gateway import redis_cache
from broker.gateway.cache import Recorded
from broker.gateway.caller import Endpoint
from broker.gateway.heads import parse_response
from broker.gateway.policy import CacheRule, CacheStore
from broker.gateway.redis_cache import pack, unpack
from broker.gateway.responses import Responses
from broker.host.tasks import TaskOwner
from tests.host import missing

RULE = CacheRule(enabled=True, ttl_s=300)
KEY, OTHER = bytes(range(32)), bytes(32)
PIECES = [b'data: {"type":"ping"}\n\n', b'data: {"type":"message_stop"}\n\n']
HEAD = parse_response(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
PASSWORD = "a-password"
WAIT_S = 20.0


class Server:
    """A redis-server on a Unix socket."""

    def __init__(self, directory: Path) -> None:
        self.socket = directory / "redis.sock"
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *options: str) -> None:
        """Returns when it can be connected to."""
        self.socket.unlink(missing_ok=True)
        command = ["redis-server", "--port", "0", "--unixsocket", str(self.socket), "--save", "", "--dir"]
        command += [str(self._directory), "--requirepass", PASSWORD, "--daemonize", "no", *options]
        try:
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE)
        except FileNotFoundError:
            missing("redis-server is not installed")
            return
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if b"ready to accept connections" in line.lower():
                return
        pytest.fail("redis-server did not start")

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(WAIT_S)
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._process = None

    def store(self, **more: Any) -> CacheStore:
        found = {"redis_url": f"unix://{self.socket}", "redis_password": PASSWORD, "redis_timeout_s": 0.5, **more}
        return CacheStore(backend="redis", **found)


@pytest.fixture
def server() -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="cortex-redis-") as directory:
        found = Server(Path(directory))
        found.start()
        yield found
        found.kill()


@pytest.fixture
async def make() -> AsyncIterator[Callable[[CacheStore], Responses]]:
    tasks, made = TaskOwner("test"), list[Responses]()

    def one(store: CacheStore) -> Responses:
        made.append(Responses(store, tasks))
        return made[-1]

    yield one
    await tasks.close()
    for each in made:
        await each.close()


def record(responses: Responses, key: bytes = KEY, pieces: list[bytes] = PIECES) -> None:
    recorder = responses.recorder(RULE, Endpoint.GENERATE, key)
    recorder.head(HEAD)
    recorder.body(pieces)
    recorder.end()


async def found(responses: Responses, key: bytes = KEY, pieces: list[bytes] = PIECES) -> Recorded:
    """The answer, as soon as it is there."""
    async with asyncio.timeout(WAIT_S):
        while (answer := await responses.get(key)) is None:
            record(responses, key, pieces)
            await asyncio.sleep(0.002)
    return answer


async def test_an_answer_is_given_again_by_another_gateway(
    server: Server, make: Callable[[CacheStore], Responses]
) -> None:
    one, other = make(server.store()), make(server.store())
    assert one.asynchronous
    assert await one.get(KEY) is None
    record(one)
    answer = await found(other)
    assert (answer.status, answer.reason, answer.pieces, answer.chunked) == (200, b"OK", PIECES, True)
    assert answer.headers == [(b"content-type", b"text/event-stream"), (b"x-cortex-cache", b"hit"), (b"age", b"0")]
    view = other.view()
    assert (view["backend"], view["redis"], view["hits"]) == ("redis", "up", 1)
    assert other.hit(OTHER) is None
    assert await other.get(OTHER) is None
    assert other.view()["misses"] == view["misses"] + 1
    async with Redis(unix_socket_path=str(server.socket), password=PASSWORD) as redis:
        (name,) = await redis.keys()
        assert 0 < await redis.ttl(name) <= RULE.ttl_s


async def test_redis_dies_and_comes_back(
    server: Server, make: Callable[[CacheStore], Responses], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_cache, "PAUSE_S", 0.05)
    responses = make(server.store())
    await found(responses)
    server.kill()
    with capture_logs() as logs:
        for _ in range(50):
            assert await responses.get(KEY) is None
            record(responses)
        view = responses.view()
        assert view["redis"] == "down"
        assert "redis_gone" in view["redis_trouble"]
        assert PASSWORD not in str(view)
        server.start()
        assert (await found(responses)).pieces == PIECES
    assert [each["event"] for each in logs] == ["redis_gone", "redis_back"]
    assert PASSWORD not in str(logs)
    assert responses.view()["redis"] == "up"
    assert responses.view()["redis_trouble"] == ""


async def test_a_restart_between_two_calls_costs_at_most_misses(
    server: Server, make: Callable[[CacheStore], Responses], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_cache, "PAUSE_S", 0.05)
    responses = make(server.store())
    await found(responses)
    server.kill()
    server.start()
    assert await responses.get(KEY) is None
    await found(responses)


async def test_a_redis_that_hangs_is_waited_for_once_a_pause(
    server: Server, make: Callable[[CacheStore], Responses], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_cache, "PAUSE_S", 3600.0)
    responses = make(server.store(redis_timeout_s=0.1))
    await found(responses)
    waits: list[float] = []
    timeout = asyncio.timeout

    def counted(delay: float | None) -> asyncio.Timeout:
        waits.append(delay or 0)
        return timeout(delay)

    monkeypatch.setattr("broker.gateway.redis_cache.asyncio.timeout", counted)
    server.signal(signal.SIGSTOP)
    for _ in range(20):
        assert await responses.get(KEY) is None
    server.signal(signal.SIGCONT)
    assert waits == [0.1]
    assert responses.view()["redis"] == "down"


async def test_a_late_reply_is_not_taken_for_another_answer(
    server: Server, make: Callable[[CacheStore], Responses], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_cache, "PAUSE_S", 0.01)
    responses = make(server.store(redis_timeout_s=0.1))
    await found(responses)
    server.signal(signal.SIGSTOP)
    assert await responses.get(KEY) is None
    server.signal(signal.SIGCONT)
    async with asyncio.timeout(WAIT_S):
        while responses.view()["redis"] == "down":
            assert await responses.get(OTHER) is None
            await asyncio.sleep(0.002)
    for _ in range(10):
        assert await responses.get(OTHER) is None
    assert (await found(responses)).pieces == PIECES


async def test_what_is_no_answer_to_this_question_is_none(
    server: Server, make: Callable[[CacheStore], Responses]
) -> None:
    responses = make(server.store())
    await found(responses)
    async with Redis(unix_socket_path=str(server.socket), password=PASSWORD) as redis:
        (name,) = await redis.keys()
        value = await redis.get(name)
        assert isinstance(value, bytes)
        for bad in (b"", b"nonsense", value[:-1], value.replace(KEY, OTHER)):
            await redis.set(name, bad)
            assert await responses.get(KEY) is None
        await redis.set(name, value)
    assert await responses.get(KEY) is not None
    assert responses.view()["redis"] == "up"


@pytest.mark.parametrize(
    "forged",
    [
        {"headers": [(b"content-type", b"a\r\nset-cookie: a=b")]},
        {"headers": [(b"content-type\r\nx", b"a")]},
        {"headers": [(b"set-cookie", b"a=b")]},
        {"headers": [(b"transfer-encoding", b"chunked")]},
        {"reason": b"OK\r\nx: y"},
        {"status": 101},
        {"length": 1},
        {"length": -1, "pieces": []},
        {"length": 2, "chunked": True},
        {"length": None},
    ],
)
def test_what_another_wrote_is_no_other_response(forged: dict[str, Any]) -> None:
    sound = Recorded(200, b"OK", [(b"content-type", b"text/plain")], [b"{", b"}"], False, 2)
    assert unpack(KEY, pack(KEY, sound, 1.0)) == (sound, 1.0)
    assert unpack(KEY, pack(KEY, replace(sound, **forged), 1.0)) is None


async def test_a_redis_that_is_full_still_answers(server: Server, make: Callable[[CacheStore], Responses]) -> None:
    responses = make(server.store())
    await found(responses)
    async with Redis(unix_socket_path=str(server.socket), password=PASSWORD) as redis:
        await redis.config_set("maxmemory-policy", "noeviction")
        await redis.config_set("maxmemory", 1)
    with capture_logs() as logs:
        async with asyncio.timeout(WAIT_S):
            while responses.view()["redis_errors"] < 2:
                record(responses, OTHER)
                assert await responses.get(KEY) is not None
    assert [each["event"] for each in logs] == ["redis_refuses"]
    assert responses.view()["redis"] == "up"


async def test_a_wrong_password_is_said_and_costs_only_the_cache(
    server: Server, make: Callable[[CacheStore], Responses]
) -> None:
    with capture_logs() as logs:
        responses = make(server.store(redis_password="wrong-password"))
        assert await responses.get(KEY) is None
        record(responses)
    assert [each["event"] for each in logs] == ["redis_gone"]
    assert "wrong-password" not in str(logs) + str(responses.view())


async def test_many_at_once_find_their_own(server: Server, make: Callable[[CacheStore], Responses]) -> None:
    responses = make(server.store(redis_timeout_s=10.0))
    texts = {number.to_bytes(32): [b'data: {"n":%d,"done":true}\n\n' % number] for number in range(200)}
    for key, pieces in texts.items():
        await found(responses, key, pieces)
    asked = [key for key in texts for _ in range(5)]
    for key, answer in zip(asked, await asyncio.gather(*map(responses.get, asked)), strict=True):
        assert answer is not None
        assert answer.pieces == texts[key]
    assert responses.view()["redis_errors"] == 0
