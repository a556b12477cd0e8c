"""What is recorded is given again as it came, for its time; what failed, was cut or is too large is not kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from broker.gateway.caller import Endpoint, endpoint_of
from broker.gateway.heads import Headers, parse_response
from broker.gateway.policy import CacheRule, CacheStore
from broker.gateway.responses import Recorder, Responses
from broker.host.tasks import TaskOwner

RULE = CacheRule(enabled=True, ttl_s=300, list_ttl_s=60, max_entry_bytes=1000)
ASKED: dict[str, Any] = {"model": "m", "temperature": 0}
STREAM = [b'data: {"type":"message_st', b'art"}\n\n', b'data: {"type":"message_stop"}\n\n']


class World:
    def __init__(self) -> None:
        self.now = 1000.0
        self.responses = Responses(CacheStore(max_bytes=100_000), TaskOwner("test"), lambda: self.now)

    def key(
        self, provider: str = "p", scope: str = "s", target: bytes = b"/v1/messages", headers: Headers | None = None,
        **fields: Any,
    ) -> bytes:  # fmt: skip
        body = json.dumps({**ASKED, **fields}).encode()
        endpoint = endpoint_of(b"POST", target)
        key = self.responses.key(RULE, provider, scope, endpoint, b"POST", target, headers or [], body)
        assert key is not None
        return key

    def recorder(self, key: bytes, endpoint: Endpoint = Endpoint.GENERATE) -> Recorder:
        return self.responses.recorder(RULE, endpoint, key)

    def record(
        self, key: bytes, pieces: list[bytes], *, status: int = 200, kind: bytes = b"application/json",
        framing: bytes = b"transfer-encoding: chunked", endpoint: Endpoint = Endpoint.GENERATE,
    ) -> None:  # fmt: skip
        recorder = self.recorder(key, endpoint)
        recorder.head(parse_response(
            b"HTTP/1.1 %d OK\r\ncontent-type: %s\r\nset-cookie: a=b\r\n%s\r\n\r\n" % (status, kind, framing)
        ))  # fmt: skip
        for piece in pieces:
            recorder.body([piece])
        recorder.end()


async def test_a_stream_is_given_again_piece_by_piece() -> None:
    world = World()
    key = world.key(stream=True)
    assert world.responses.hit(key) is None
    world.record(key, STREAM, kind=b"text/event-stream")
    world.now += 7.5
    for _ in range(2):
        answer = await world.responses.get(key)
        assert answer is not None
        assert (answer.status, answer.reason, answer.pieces, answer.chunked) == (200, b"OK", STREAM, True)
        assert answer.headers == [(b"content-type", b"text/event-stream"), (b"x-cortex-cache", b"hit"), (b"age", b"7")]
    view = world.responses.view()
    assert (view["hits"], view["misses"], view["stored"], view["entries"]) == (2, 1, 1, 1)
    assert not world.responses.asynchronous


async def test_a_body_of_known_length_is_one_piece() -> None:
    world = World()
    world.record(world.key(), [b'{"a":', b"1}"], framing=b"content-length: 7")
    answer = world.responses.hit(world.key())
    assert answer is not None
    assert (answer.pieces, answer.chunked, answer.length) == ([b'{"a":1}'], False, 7)


@pytest.mark.parametrize(("endpoint", "ttl"), [(Endpoint.GENERATE, 300), (Endpoint.EMBED, 300), (Endpoint.LIST, 60)])
async def test_each_kind_has_its_time(endpoint: Endpoint, ttl: float) -> None:
    world = World()
    world.record(world.key(), [b"{}"], endpoint=endpoint)
    world.now += ttl - 1
    assert world.responses.hit(world.key()) is not None
    world.now += 1
    assert world.responses.hit(world.key()) is None


@pytest.mark.parametrize("status", [201, 204, 206, 301, 400, 429, 500, 529])
async def test_other_statuses_are_not_kept(status: int) -> None:
    world = World()
    world.record(world.key(), [b"{}"], status=status)
    assert world.responses.hit(world.key()) is None


async def test_neither_half_answers_nor_failures_nor_large_ones_are_kept() -> None:
    world = World()
    key = world.key()
    world.record(key, STREAM[:2], kind=b"text/event-stream")
    world.record(key, [b'{"error":{"message":"x"}}'])
    world.record(key, [b'{"a":"', b"a" * 993, b'"}'])
    world.record(key, [b"{}"], framing=b"content-length: 1001")
    recorder = world.recorder(key)
    recorder.head(parse_response(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n"))
    recorder.body([b"{}"])
    recorder.spoil()
    recorder.end()
    world.recorder(key).end()
    assert world.responses.hit(key) is None
    assert world.responses.view()["stored"] == 0


async def test_who_asks_whom_counts() -> None:
    world = World()
    keys = {
        world.key(), world.key("q"), world.key(scope="t"), world.key(target=b"/v1/chat/completions"),
        world.key(stream=True), world.key(headers=[(b"anthropic-beta", b"x")]), world.key("ps", ""),
        world.key("", "ps"),
    }  # fmt: skip
    assert len(keys) == 8
    assert world.key(headers=[(b"user-agent", b"x"), (b"x-claude-code-session-id", b"y")]) == world.key()
    no_cache = [(b"cache-control", b"no-cache")]
    body = json.dumps(ASKED).encode()
    assert world.responses.key(RULE, "p", "s", Endpoint.GENERATE, b"POST", b"/v1/messages", no_cache, body) is None


async def test_written_answers_hold_for_all_and_until_they_are_taken_back(tmp_path: Path) -> None:
    world = World()
    path = tmp_path / "answers"
    lines = [{"target": "/v1/messages", "body": ASKED, "response": {"type": "message"}}, {"target": 1}]
    path.write_text("\n".join(map(json.dumps, lines)))
    rule = CacheRule(enabled=True, prewarm_file=str(path))
    loaded = await world.responses.prewarm("p", rule)
    assert len(loaded.bad) == 1
    world.now += 10_000
    for scope in ("s", "t"):
        answer = world.responses.hit(world.key(scope=scope, headers=[(b"accept", scope.encode())]))
        assert answer is not None
        assert answer.pieces == [b'{"type":"message"}']
        assert answer.headers[-1] == (b"age", b"10000")
    assert world.responses.hit(world.key("q")) is None
    await world.responses.prewarm("p", CacheRule(enabled=True))
    assert world.responses.hit(world.key()) is None


async def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    loaded = await World().responses.prewarm("p", CacheRule(enabled=True, prewarm_file=str(tmp_path / "none")))
    assert loaded.bad == ["No such file or directory"]


@pytest.mark.parametrize("url", ["redis://:a-password@host:port", "http://host", ""])
async def test_a_malformed_url_of_redis_is_said_and_memory_is_used(url: str) -> None:
    with capture_logs() as logs:
        responses = Responses(CacheStore(backend="redis", redis_url=url), TaskOwner("test"))
    assert not responses.asynchronous
    assert responses.view()["backend"] == "memory"
    assert [each["event"] for each in logs] == ["redis_url_malformed"]
    assert "a-password" not in str(logs)
    await responses.close()
