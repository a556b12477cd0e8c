"""Answers that an operator has written down are given; a line that is wrong is named and costs the others nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.gateway.policy import CacheRule
from broker.gateway.prewarm import load, parse

RULE = CacheRule(enabled=True)
ASKED = {"model": "m", "temperature": 0, "messages": []}
STREAM = "event: a\ndata: {}\n\ndata: {\"type\":\"message_stop\"}\n\n"  # fmt: skip


def line(target: str = "/v1/messages", body: Any = ASKED, response: Any = None, **more: Any) -> bytes:
    response = {"type": "message"} if response is None else response
    return json.dumps({"target": target, "body": body, "response": response, **more}).encode() + b"\n"


def test_json_and_streams_of_both_kinds() -> None:
    loaded = parse(
        [
            line(),
            b"\n",
            line(body={**ASKED, "stream": True}, response=STREAM),
            line("/api/chat", {"model": "m", "options": {"temperature": 0}}, '{"message":{}}\n{"done":true}\n'),
            line("/v1/models", None, {"data": []}),
        ],
        "p", RULE, 10**6,
    )  # fmt: skip
    assert not loaded.bad
    plain, stream, lines, models = loaded.answers.values()
    assert (plain.pieces, plain.chunked, plain.length) == ([b'{"type":"message"}'], False, 18)
    assert (stream.pieces, stream.chunked) == ([STREAM.encode()[:19], STREAM.encode()[19:]], True)
    assert stream.headers == [(b"content-type", b"text/event-stream")]
    assert lines.pieces == [b'{"message":{}}\n', b'{"done":true}\n']
    assert lines.headers == [(b"content-type", b"application/x-ndjson")]
    assert models.pieces == [b'{"data":[]}']


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (b"{", "truncated"),
        (b'{"body":1}', "target"),
        (b'{"target":"/v1/messages"}', "response"),
        (line(more=1), "more"),
        (line(body={**ASKED, "temperature": 1}), "temperature 0"),
        (line(body={**ASKED, "tools": [{"name": "t"}]}), "tools"),
        (line("/v1/files"), "target"),
        (line(response="data: {}\n\n"), "whole answer"),
        (line(response={"error": {"message": "secret"}}), "whole answer"),
        (line(response=["secret"]), "whole answer"),
        (line(body=7), "never answered"),
        (b"\xff\n", "line 2"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named_and_skipped(bad: bytes, why: str) -> None:
    loaded = parse([line(), bad, line(body={**ASKED, "x": 1})], "p", RULE, 10**6)
    assert len(loaded.answers) == 2
    assert len(loaded.bad) == 1
    assert loaded.bad[0].startswith("line 2: ")
    assert why in loaded.bad[0]
    assert "secret" not in loaded.bad[0]


def test_memory_is_bounded() -> None:
    lines = [line(body={**ASKED, "x": number}, response={"text": "a" * 1000}) for number in range(10)]
    loaded = parse(lines, "p", RULE, 5000)
    assert 0 < len(loaded.answers) <= 5
    assert sum(each.cost for each in loaded.answers.values()) <= 5000
    assert len(loaded.bad) == 10 - len(loaded.answers)


def test_a_provider_has_its_own() -> None:
    assert not parse([line()], "p", RULE, 10**6).answers.keys() & parse([line()], "q", RULE, 10**6).answers.keys()


@given(st.lists(st.binary(max_size=30)))
def test_rubbish_is_only_named(lines: list[bytes]) -> None:
    loaded = parse([each.replace(b"\n", b"") for each in lines] + [line()], "p", RULE, 10**6)
    assert len(loaded.answers) == 1
    assert len(loaded.bad) == sum(bool(each.strip()) for each in (one.replace(b"\n", b"") for one in lines))


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_bytes(line() + b"oops\n")
    loaded = load(path, "p", RULE, 10**6)
    assert len(loaded.answers) == len(loaded.bad) == 1
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none", "p", RULE, 10**6)
