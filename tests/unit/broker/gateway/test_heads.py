"""Heads: what is accepted, what is refused, and that nothing but a ``CortexError`` ever comes out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import Code, CortexError
from broker.gateway.heads import END, parse_request, parse_response

HOST = b"Host: x\r\n"


def test_a_request_is_taken_apart() -> None:
    raw = b"POST /p/x?y HTTP/1.1\r\n" + HOST + b"Content-Length: 12\r\nExpect: 100-continue\r\nX-A:  b \r\n\r\n"
    head = parse_request(raw)
    assert (head.method, head.target, head.version) == (b"POST", b"/p/x?y", "1.1")
    assert (head.length, head.chunked, head.has_body) == (12, False, True)
    assert head.expect_continue
    assert head.keep_alive
    assert (b"X-A", b"b") in [(name, value.strip()) for name, value in head.headers]


def test_connection_options_are_noted() -> None:
    head = parse_request(b"GET / HTTP/1.1\r\n" + HOST + b"Connection: Close, X-Secret\r\n\r\n")
    assert not head.keep_alive
    assert b"x-secret" in head.hop_by_hop


@pytest.mark.parametrize("value", [b"websocket", b"WebSocket", b"h2c, websocket"])
def test_a_websocket_upgrade_is_seen(value: bytes) -> None:
    raw = b"GET / HTTP/1.1\r\n" + HOST + b"Connection: Upgrade\r\nUpgrade: " + value + b"\r\n\r\n"
    assert parse_request(raw).websocket


@pytest.mark.parametrize(
    "lines",
    [
        b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n",
        b"Content-Length: 3\r\nContent-Length: 3\r\n",
        b"Content-Length: 3, 3\r\n",
        b"Content-Length: +3\r\n",
        b"Content-Length: 0x3\r\n",
        b"Content-Length: 9999999999999999\r\n",
        b"Content-Length: \r\n",
        b"Transfer-Encoding: gzip, chunked\r\n",
        b"Transfer-Encoding: identity\r\n",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: xchunked\r\n",
        b"Content-Length : 3\r\n",
        b"A: b\r\n folded\r\n",
        b"A: b\nContent-Length: 3\r\n",
        b"A: b\rContent-Length: 3\r\n",
        b"A: b\x00c\r\n",
        b"Host: y\r\n",
        b": b\r\n",
        b"no colon\r\n",
    ],
)
def test_what_two_parsers_could_read_differently_is_refused(lines: bytes) -> None:
    with pytest.raises(CortexError) as caught:
        parse_request(b"POST / HTTP/1.1\r\n" + HOST + lines + b"\r\n")
    assert caught.value.code is Code.BAD_REQUEST


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"GET / HTTP/1.0", Code.HTTP_VERSION),
        (b"GET / HTTP/2.0", Code.HTTP_VERSION),
        (b"GET /#a HTTP/1.1", Code.BAD_REQUEST),
        (b"GET /\xff HTTP/1.1", Code.BAD_REQUEST),
        (b"GET /a b HTTP/1.1", Code.BAD_REQUEST),
        (b"WHAT / HTTP/1.1", Code.BAD_REQUEST),
        (b"GET /", Code.HTTP_VERSION),
        (b"PRI * HTTP/2.0", Code.BAD_REQUEST),
    ],
)
def test_bad_request_lines(line: bytes, code: Code) -> None:
    with pytest.raises(CortexError) as caught:
        parse_request(line + b"\r\n" + HOST + b"\r\n")
    assert caught.value.code is code


def test_connect_may_be_http_1_0_and_has_no_body() -> None:
    assert not parse_request(b"CONNECT a:443 HTTP/1.0\r\n\r\n").keep_alive
    with pytest.raises(CortexError):
        parse_request(b"CONNECT a:443 HTTP/1.1\r\n" + HOST + b"Content-Length: 3\r\n\r\n")


def test_too_many_headers() -> None:
    with pytest.raises(CortexError) as caught:
        parse_request(b"GET / HTTP/1.1\r\n" + HOST + b"A: b\r\n" * 300 + b"\r\n")
    assert caught.value.code is Code.HEAD_TOO_LARGE


def test_two_requests_are_not_one_head() -> None:
    request = b"GET / HTTP/1.1\r\n" + HOST + b"\r\n"
    with pytest.raises(CortexError):
        parse_request(request + request)


def test_a_response_is_taken_apart() -> None:
    head = parse_response(b"HTTP/1.1 200 Fine\r\nTransfer-Encoding: chunked\r\nKeep-Alive: timeout=5, max=9\r\n\r\n")
    assert (head.status, head.reason, head.chunked, head.length) == (200, b"Fine", True, None)
    assert head.keep_alive
    assert head.keep_alive_s == 5


@pytest.mark.parametrize("line", [b"000 Zero", b"099 x", b"200 O\x00K", b"200 \x7f", b"2000 x", b"20 x"])
def test_a_status_line_that_no_client_could_read_is_refused(line: bytes) -> None:
    with pytest.raises(CortexError):
        parse_response(b"HTTP/1.1 %s\r\n\r\n" % line)


def test_an_old_response_keeps_the_connection_only_when_it_says_so() -> None:
    assert not parse_response(b"HTTP/1.0 200 OK\r\n\r\n").keep_alive
    assert parse_response(b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\n\r\n").keep_alive


@given(st.binary(max_size=200), st.sampled_from([b"", b"GET / HTTP/1.1\r\nHost: x\r\n", b"HTTP/1.1 200 OK\r\n"]))
def test_any_bytes_parse_or_are_refused(noise: bytes, start: bytes) -> None:
    for parse in (parse_request, parse_response):
        try:
            parse(start + noise + END)
        except CortexError:
            continue


@given(st.binary(max_size=40))
def test_no_header_value_ends_the_head_early(value: bytes) -> None:
    """What follows the blank line can never come out of a header's value."""
    try:
        head = parse_request(b"GET / HTTP/1.1\r\n" + HOST + b"A: " + value + END)
    except CortexError:
        return
    assert len(head.headers) == 2
    assert head.length is None
    assert not head.chunked
