"""An answer on its way: framed for the sandbox however it came, one write a read, read by the meter or not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import CortexError
from broker.gateway.cache import Recorded
from broker.gateway.caller import Endpoint
from broker.gateway.framing import ChunkedBody, response_body
from broker.gateway.heads import ResponseHead
from broker.gateway.meter import Meter
from broker.gateway.outgoing import Outgoing

USAGE = b'{"model": "m", "usage": {"prompt_tokens": 3, "completion_tokens": 2}}'


class Down:
    """A sandbox's connection; ``writes``: each as one piece."""

    congested = False
    closing_soon = False

    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self.touched = 0

    def send(self, parts: list[bytes]) -> None:
        self.writes.append(b"".join(parts))

    def hold(self, held: bool) -> None: ...

    def touch(self) -> None:
        self.touched += 1

    def fail(self, error: CortexError) -> None: ...
    def cut(self) -> None: ...
    def finish(self, keep_alive: bool) -> None: ...


def outgoing(down: Down, meter: Meter | None = None) -> Outgoing:
    return Outgoing(down, meter, lambda: 7.0)


def head(status: int = 200, length: int | None = None, *, chunked: bool = False) -> ResponseHead:
    return ResponseHead(status, b"OK", [(b"x-a", b"1")], length, chunked, True, None, frozenset())


def begin(out: Outgoing, found: ResponseHead, method: bytes = b"POST") -> None:
    out.head(found, response_body(found.status, method, found.length, found.chunked), method)


def test_head_and_body_of_one_read_are_one_write() -> None:
    down = Down()
    out = outgoing(down)
    begin(out, head(length=2))
    out.body([b"ok"])
    assert down.writes == []
    out.flush()
    assert down.writes == [b"HTTP/1.1 200 OK\r\nx-a: 1\r\ncontent-length: 2\r\n\r\nok"]
    out.flush()
    assert len(down.writes) == 1, "nothing is sent of nothing"


@given(st.lists(st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=3), max_size=6), st.booleans())
def test_what_has_no_length_is_chunked_and_arrives_whole(reads: list[list[bytes]], chunked: bool) -> None:
    down = Down()
    out = outgoing(down)
    begin(out, head(chunked=chunked))
    for pieces in reads:
        out.body(pieces)
        out.flush()
    out.end()
    sent = b"".join(down.writes)
    start = sent.index(b"\r\n\r\n") + 4
    assert b"transfer-encoding: chunked" in sent[:start]
    body = ChunkedBody()
    pieces, used = body.feed(sent[start:])
    assert body.done
    assert used == len(sent) - start
    assert b"".join(pieces) == b"".join(map(b"".join, reads))


@pytest.mark.parametrize("status", [204, 304])
def test_an_answer_without_a_body_has_none(status: int) -> None:
    down = Down()
    out = outgoing(down)
    begin(out, head(status, chunked=True))
    out.end()
    assert down.writes[0].endswith(b"\r\n\r\n")
    assert b"0\r\n\r\n" not in down.writes[0]


def test_head_says_how_the_body_would_come() -> None:
    down = Down()
    out = outgoing(down)
    begin(out, head(chunked=True), b"HEAD")
    out.end()
    assert down.writes[0].endswith(b"transfer-encoding: chunked\r\n\r\n")


def test_of_interim_answers_100_stays_here() -> None:
    down = Down()
    out = outgoing(down)
    out.interim(head(100))
    out.interim(head(103))
    out.flush()
    assert down.writes == [b"HTTP/1.1 103 OK\r\nx-a: 1\r\n\r\n"]
    assert not out.begun


@pytest.mark.parametrize(("metered", "tokens"), [(True, 5), (False, None)])
def test_an_answer_got_with_others_is_read_for_usage_and_one_from_before_is_not(
    metered: bool, tokens: int | None
) -> None:
    meter = Meter("openai", Endpoint.EMBED, b"/v1/embeddings")
    down = Down()
    out = outgoing(down, meter)
    headers = [(b"content-type", b"application/json")]
    out.recorded(Recorded(200, b"OK", headers, [], False, len(USAGE)), metered=metered)
    out.body([USAGE])
    out.end()
    assert down.writes[0].endswith(b"content-length: %d\r\n\r\n" % len(USAGE) + USAGE)
    assert meter.finish().tokens == tokens
    assert (out.begun, out.status, out.first) == (True, 200, 7.0)


def test_a_sandbox_that_has_gone_gets_nothing_more() -> None:
    down = Down()
    out = outgoing(down)
    begin(out, head(length=4))
    out.body([b"ab"])
    out.desert()
    out.body([b"cd"])
    out.end()
    assert b"".join(down.writes).endswith(b"ab")


def test_an_answer_that_has_no_body_says_no_length_either() -> None:
    down = Down()
    out = outgoing(down)
    begin(out, head(204, 5))
    out.end()
    assert down.writes == [b"HTTP/1.1 204 OK\r\nx-a: 1\r\n\r\n"]


def test_a_stream_from_before_is_a_stream_again() -> None:
    down = Down()
    out = outgoing(down)
    out.recorded(Recorded(200, b"OK", [], [], True), metered=False)
    out.body([b"ab"])
    out.end()
    assert down.writes == [b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n"]


def test_a_connection_that_is_to_end_is_said_to_with_the_answer() -> None:
    down = Down()
    down.closing_soon = True
    out = outgoing(down)
    begin(out, head(length=0))
    out.flush()
    assert b"\r\nconnection: close\r\n" in down.writes[0]


def test_an_answer_began_with_its_first_bytes_and_each_is_a_sign_of_life() -> None:
    times = iter((7.0, 8.0))
    down = Down()
    out = Outgoing(down, None, lambda: next(times))
    begin(out, head(length=2))
    assert (out.first, down.touched) == (None, 1)
    out.body([b"o"])
    out.body([b"k"])
    assert (out.first, down.touched) == (7.0, 3)
