"""An answer is whole by its own words alone: no failure, no half stream, however cleanly its bytes end."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest

from broker.gateway.cache import Recorded
from broker.gateway.complete import complete

SSE = b"text/event-stream; charset=utf-8"
NDJSON = b"application/x-ndjson"


def judged(body: bytes, kind: bytes = b"application/json", coding: bytes = b"") -> bool:
    headers = [(b"Content-Type", kind)] + ([(b"content-encoding", coding)] if coding else [])
    return complete(Recorded(200, b"OK", headers, [body[:3], body[3:]], True))


def sse(*events: Any) -> bytes:
    return b"".join(
        b"data: " + (each if isinstance(each, bytes) else json.dumps(each).encode()) + b"\n\n" for each in events
    )


STREAMS = [
    sse({"type": "message_start"}, {"type": "ping"}, {"type": "message_stop"}),
    b"event: response.created\n" + sse({"type": "response.created"}, {"type": "response.completed", "response": {}}),
    sse({"choices": [{"delta": {"content": "x"}}]}, b"[DONE]"),
    sse({"candidates": [{"content": {}}]}, {"candidates": [{"finishReason": "STOP"}]}),
    sse({"response": {"candidates": [{"finishReason": "STOP"}]}}),
]


@pytest.mark.parametrize("text", STREAMS)
def test_a_stream_is_whole_with_its_last_word_alone(text: bytes) -> None:
    assert judged(text, SSE)
    assert judged(text.replace(b"\n", b"\r\n"), SSE)
    events = text.split(b"\n\n")
    assert not judged(b"\n\n".join(events[:-2]) + b"\n\n", SSE)
    assert not judged(text[:-4], SSE)


@pytest.mark.parametrize("text", STREAMS)
@pytest.mark.parametrize(
    "failure",
    [
        {"type": "error", "error": {"type": "overloaded_error"}}, {"error": {"message": "x"}},
        {"type": "response.failed"}, {"type": "response.incomplete"}, b"nonsense", b"[]",
    ],
)  # fmt: skip
def test_a_stream_with_a_failure_in_it_is_none(text: bytes, failure: Any) -> None:
    assert not judged(sse(failure) + text, SSE)
    assert not judged(text + sse(failure), SSE)


def test_an_error_event_without_data_is_a_failure() -> None:
    assert not judged(b"event: error\n\n" + STREAMS[0], SSE)


def test_lines_of_json_end_with_done() -> None:
    assert judged(b'{"response":"a","done":false}\n{"done":true}\n', NDJSON)
    assert not judged(b'{"response":"a","done":false}\n', NDJSON)
    assert not judged(b'{"error":"out of memory"}\n{"done":true}\n', NDJSON)


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        (b'{"type":"message","content":[]}', True),
        (b'{"object":"response","status":"completed","error":null}', True),
        (b'{"data":[]}', True),
        (b'[{"candidates":[{}]},{"candidates":[{"finishReason":"STOP"}]}]', True),
        (b'{"type":"error","error":{}}', False),
        (b'{"error":{"message":"x"}}', False),
        (b'{"object":"response","status":"incomplete","error":null}', False),
        (b'{"object":"response","status":"in_progress"}', False),
        (b'[{"candidates":[{}]}]', False),
        (b'[{"error":{"code":500}}]', False),
        (b"[]", False),
        (b'"text"', False),
        (b'{"type":"mess', False),
        (b"", False),
        (b"[" * 100_000, False),
    ],
)
def test_json_is_whole_when_it_can_be_read_and_is_no_failure(text: bytes, whole: bool) -> None:
    assert judged(text) is whole


def test_packed_bodies_are_looked_into_and_what_cannot_be_is_not_trusted() -> None:
    good, bad = b'{"data":[]}', b'{"error":{"message":"x"}}'
    assert judged(gzip.compress(good), coding=b"gzip")
    assert not judged(gzip.compress(bad), coding=b"gzip")
    assert not judged(gzip.compress(good)[:-4], coding=b"gzip")
    assert not judged(good, coding=b"gzip")
    assert not judged(good, coding=b"br")
    assert not judged(gzip.compress(b'{"a":"' + bytes(20 * 2**20) + b'"}'), coding=b"gzip")


@pytest.mark.parametrize("count", [10, 23, 24, 25, 100])
def test_long_streams_are_judged_by_their_end_and_by_what_fails_anywhere(count: int) -> None:
    many = [{"type": "delta", "text": "a\n\nb"}] * count
    assert judged(sse(*many, {"type": "message_stop"}), SSE)
    assert not judged(sse(*many), SSE)
    for failure in ({"type": "error"}, {"error": {"code": 1}}, {"type": "response.failed"}):
        assert not judged(sse(many[0], failure, *many, {"type": "message_stop"}), SSE)
    assert judged(sse({"text": "an error?", "error": None}, *many, {"type": "message_stop"}), SSE)
    lines = b'{"done":false}\n' * count
    assert judged(lines + b'{"done":true}\n', NDJSON)
    assert not judged(b'{"error":"x"}\n' + lines + b'{"done":true}\n', NDJSON)
