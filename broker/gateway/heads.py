"""Request and response heads, RFC 9112: parsed by llhttp (httptools), then held to stricter rules. Pure.

A head is parsed only when all of it is there, up to its blank line, and bare CR or LF are refused,
so that where it ends is never a matter of opinion (request smuggling lives off two opinions).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import httptools

from broker.errors import Code, CortexError

Headers = list[tuple[bytes, bytes]]

END = b"\r\n\r\n"
MAX_HEADERS = 256
MAX_LENGTH_DIGITS = 15
_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")


@dataclass(slots=True)
class RequestHead:
    """``headers`` as sent, in order. ``length`` None and not ``chunked``: no body."""

    method: bytes
    target: bytes
    version: str
    headers: Headers
    length: int | None
    chunked: bool
    keep_alive: bool
    expect_continue: bool
    websocket: bool
    hop_by_hop: frozenset[bytes] = field(default_factory=frozenset)

    @property
    def has_body(self) -> bool:
        return self.chunked or bool(self.length)


@dataclass(slots=True)
class ResponseHead:
    """``length`` None and not ``chunked``: the body, if there may be one, lasts until the close."""

    status: int
    reason: bytes
    headers: Headers
    length: int | None
    chunked: bool
    keep_alive: bool
    keep_alive_s: float | None
    hop_by_hop: frozenset[bytes]


class _Collector:
    """What httptools calls while it parses."""

    __slots__ = ("complete", "headers", "reason", "target")

    def __init__(self) -> None:
        self.headers: Headers = []
        self.target = b""
        self.reason = b""
        self.complete = False

    def on_url(self, url: bytes) -> None:
        self.target += url

    def on_status(self, reason: bytes) -> None:
        self.reason += reason

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        self.complete = True


def bad(what: str) -> CortexError:
    """A request that breaks RFC 9112."""
    return CortexError(
        Code.BAD_REQUEST, what[:1].upper() + what[1:], hint="send one well-formed HTTP/1.1 request at a time"
    )


def parse_request(raw: bytes) -> RequestHead:
    """The request head in ``raw``, blank line included. Raises ``CortexError`` (400, 505)."""
    seen = _Collector()
    parser = httptools.HttpRequestParser(seen)
    _feed(parser, seen, raw, "request")
    version = parser.get_http_version()
    method = parser.get_method()
    if version not in ("1.1", "1.0") or (version == "1.0" and method != b"CONNECT"):
        raise CortexError(Code.HTTP_VERSION, f"HTTP/{version} is not spoken here", hint="use HTTP/1.1")
    if b"#" in seen.target or not seen.target:
        raise bad("the request target is malformed")
    facts = _Facts(seen.headers)
    if version == "1.1" and facts.hosts != 1:
        raise bad("a request needs exactly one Host header")
    if method == b"CONNECT" and (facts.chunked or facts.length):
        raise bad("a CONNECT request has no body")
    return RequestHead(
        method=method,
        target=seen.target,
        version=version,
        headers=seen.headers,
        length=facts.length,
        chunked=facts.chunked,
        keep_alive=version == "1.1" and b"close" not in facts.connection,
        expect_continue=facts.expect_continue,
        websocket=facts.websocket,
        hop_by_hop=facts.connection,
    )


def parse_response(raw: bytes) -> ResponseHead:
    """The response head in ``raw``, blank line included. Raises ``CortexError`` (400: the caller says whose)."""
    seen = _Collector()
    parser = httptools.HttpResponseParser(seen)
    _feed(parser, seen, raw, "response")
    version = parser.get_http_version()
    if version not in ("1.1", "1.0"):
        raise bad(f"the response is HTTP/{version}")
    if parser.get_status_code() < 100 or _CONTROL.search(seen.reason):
        raise bad("the status line is malformed")
    facts = _Facts(seen.headers)
    keep = b"close" not in facts.connection if version == "1.1" else b"keep-alive" in facts.connection
    return ResponseHead(
        status=parser.get_status_code(),
        reason=seen.reason,
        headers=seen.headers,
        length=facts.length,
        chunked=facts.chunked,
        keep_alive=keep,
        keep_alive_s=facts.keep_alive_s,
        hop_by_hop=facts.connection,
    )


def _feed(
    parser: httptools.HttpRequestParser | httptools.HttpResponseParser, seen: _Collector, raw: bytes, what: str
) -> None:
    lines = raw.count(b"\r\n")
    if raw.count(b"\n") != lines or raw.count(b"\r") != lines or not raw.endswith(END):
        raise bad(f"the {what} has a bare CR or LF")
    try:
        parser.feed_data(raw)
    except httptools.HttpParserUpgrade:
        pass
    except httptools.HttpParserError as error:
        raise bad(f"the {what} is malformed: {error}") from error
    if not seen.complete:
        raise bad(f"the {what} is malformed")
    if len(seen.headers) > MAX_HEADERS:
        raise CortexError(Code.HEAD_TOO_LARGE, f"the {what} has over {MAX_HEADERS} headers", hint="send fewer headers")


class _Facts:
    """What the framing headers say. Raises for anything that two parsers could read differently."""

    __slots__ = ("chunked", "connection", "expect_continue", "hosts", "keep_alive_s", "length", "websocket")

    def __init__(self, headers: Headers) -> None:
        self.hosts = 0
        self.length: int | None = None
        self.chunked = False
        self.expect_continue = False
        self.websocket = False
        self.keep_alive_s: float | None = None
        connection: list[bytes] = []
        for name, value in headers:
            # Most headers are none of these; the length test spares them the lookup.
            if len(name) > 17:
                continue
            match name.lower():
                case b"host":
                    self.hosts += 1
                case b"content-length":
                    self._set_length(value)
                case b"transfer-encoding":
                    if self.chunked or value.strip().lower() != b"chunked":
                        raise bad("the only transfer encoding spoken is one chunked")
                    self.chunked = True
                case b"connection":
                    connection += [token.strip().lower() for token in value.split(b",")]
                case b"expect":
                    self.expect_continue = value.strip().lower() == b"100-continue"
                case b"upgrade":
                    self.websocket |= b"websocket" in [token.strip().lower() for token in value.split(b",")]
                case b"keep-alive":
                    self.keep_alive_s = _timeout(value)
        if self.chunked and self.length is not None:
            raise bad("both Content-Length and Transfer-Encoding")
        self.connection = frozenset(connection)

    def _set_length(self, value: bytes) -> None:
        text = value.strip()
        if self.length is not None or not text.isdigit() or len(text) > MAX_LENGTH_DIGITS:
            raise bad("Content-Length is malformed or given twice")
        self.length = int(text)


def _timeout(value: bytes) -> float | None:
    """The seconds in ``Keep-Alive: timeout=5, max=100``."""
    for part in value.split(b","):
        key, _, number = part.strip().partition(b"=")
        if key.lower() == b"timeout" and number.isdigit() and len(number) < 9:
            return float(number)
    return None
