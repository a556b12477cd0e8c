"""The opening handshake: what is read out of a request, what is refused, and that tokens do not leak."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.errors import Code, CortexError
from broker.front.handshake import accept, read, refuse, too_big

HEADERS = {
    "Host": "127.0.0.1:8765",
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    "Sec-WebSocket-Version": "13",
}


def head(target: str = "/acp", *, method: str = "GET", extra: str = "", version: str = "1.1", **changes: str) -> bytes:
    """A request; ``changes`` by header name with underscores, "" leaves it out."""
    headers = dict(HEADERS)
    for name, value in changes.items():
        headers[name.replace("_", "-")] = value
    lines = [f"{method} {target} HTTP/{version}", *[f"{name}: {value}" for name, value in headers.items() if value]]
    return ("\r\n".join(lines) + "\r\n" + extra + "\r\n").encode()


def refused(data: bytes) -> CortexError:
    with pytest.raises(CortexError) as caught:
        read(data)
    return caught.value


@pytest.mark.parametrize("target", ["/acp", "/", "/acp/ws", "/message", "/acp?client=1"])
def test_every_alias_is_acp(target: str) -> None:
    assert read(head(target)).protocol == "acp"


def test_raw_and_unknown_paths() -> None:
    assert read(head("/raw")).protocol == "raw"
    assert read(head("/nothing")).protocol is None
    assert read(head("//evil/acp")).protocol is None


def test_a_token_comes_by_header_subprotocol_or_ticket() -> None:
    assert read(head(Authorization="Bearer abc")).token == "abc"
    browser = read(head(Sec_WebSocket_Protocol="acp.v1, bearer.abc"))
    assert (browser.token, browser.blind, browser.subprotocol) == ("abc", True, "acp.v1")
    page = read(head("/acp?ticket=xyz"))
    assert (page.ticket, page.token, page.blind) == ("xyz", "", True)
    assert not read(head(Authorization="Bearer abc")).blind


@pytest.mark.parametrize(
    "request_head",
    [
        head("/acp?ticket=x", Authorization="Bearer abc"),
        head("/acp?ticket=x&ticket=y"),
        head(Sec_WebSocket_Protocol="bearer.a, bearer.b"),
        head(Sec_WebSocket_Protocol="bearer.a", Authorization="Bearer a"),
    ],
)
def test_two_tokens_are_one_too_many(request_head: bytes) -> None:
    assert refused(request_head).code is Code.BAD_REQUEST


@pytest.mark.parametrize("value", ["Basic abc", "Bearer", "Bearer  ", "abc"])
def test_another_scheme_is_not_a_token(value: str) -> None:
    assert refused(head(Authorization=value)).code is Code.TOKEN_INVALID


@pytest.mark.parametrize(
    ("offered", "selected"),
    [
        ("cortex.acp.v1, acp.v1", "cortex.acp.v1"),
        ("acp.v1, cortex.acp.v1", "acp.v1"),
        ("other, acp.v1", "acp.v1"),
        ("other", None),
        ("bearer.secret", None),
        ("", None),
    ],
)
def test_the_first_known_subprotocol_is_selected_and_a_bearer_never_echoed(offered: str, selected: str | None) -> None:
    upgrade = read(head(Sec_WebSocket_Protocol=offered))
    assert upgrade.subprotocol == selected
    assert upgrade.cortex == (selected == "cortex.acp.v1")
    answer = accept(upgrade, {"Acp-Connection-Id": "c", "Cortex-Session": "s"}).decode()
    assert answer.startswith("HTTP/1.1 101 ")
    assert "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" in answer
    assert "Acp-Connection-Id: c\r\n" in answer
    assert "bearer" not in answer
    assert ("Sec-WebSocket-Protocol" in answer) == (selected is not None)


def test_no_extension_is_ever_accepted() -> None:
    upgrade = read(head(Sec_WebSocket_Extensions="permessage-deflate; client_max_window_bits"))
    assert b"xtensions" not in accept(upgrade, {})


@pytest.mark.parametrize(
    ("request_head", "status"),
    [
        (head(method="POST"), 405),
        (head(version="1.0"), 505),
        (head(Upgrade=""), 426),
        (head(Connection="close"), 426),
        (head(Sec_WebSocket_Version="8"), 400),
        (head(Sec_WebSocket_Key=""), 400),
        (head(Sec_WebSocket_Key="short"), 400),
        (head(Host=""), 400),
        (head(extra="Host: other\r\n"), 400),
        (head(extra="Origin: a\r\nOrigin: b\r\n"), 400),
        (head(extra="Authorization: Bearer a\r\nAuthorization: Bearer b\r\n"), 400),
        (head(Content_Length="5"), 400),
        (head(Transfer_Encoding="chunked"), 400),
        (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", 400),
        (b"GET\r\n\r\n", 400),
        (b"\r\n\r\n", 400),
        (head(extra="bad header line\r\n"), 400),
        (head("/" + "a" * 9000), 400),
    ],
)
def test_bad_handshakes_are_http_errors(request_head: bytes, status: int) -> None:
    error = refused(request_head)
    answer = refuse(error)
    assert answer.startswith(f"HTTP/1.1 {status} ".encode()), answer[:80]
    body = json.loads(answer.partition(b"\r\n\r\n")[2])
    assert body["status"] == status
    assert body["code"]
    assert body["hint"]


def test_a_refusal_says_what_a_client_may_do() -> None:
    unauthorised = refuse(CortexError(Code.TOKEN_MISSING, "no token", hint="send one"))
    assert b"\r\nWWW-Authenticate: Bearer" in unauthorised
    assert b"\r\nRetry-After: " in refuse(CortexError(Code.SESSION_BUSY, "busy", hint="wait"))
    assert refuse(too_big()).startswith(b"HTTP/1.1 431 ")
    assert b"\r\nConnection: close\r\n" in unauthorised


def test_a_token_is_in_no_text_of_an_upgrade() -> None:
    upgrade = read(head("/acp?ticket=SECRET"))
    assert "SECRET" not in repr(upgrade)
    assert "SECRET" not in repr(read(head(Authorization="Bearer SECRET")))


def answered(data: bytes) -> bytes:
    try:
        return accept(read(data), {})
    except CortexError as error:
        return refuse(error)


@given(junk=st.binary(max_size=200))
@settings(deadline=None)
def test_any_bytes_are_refused_in_a_clear_way(junk: bytes) -> None:
    assert answered(junk + b"\r\n\r\n").startswith(b"HTTP/1.1 4")


@given(name=st.sampled_from(list(HEADERS)), value=st.text(st.characters(codec="latin-1"), max_size=30))
@settings(deadline=None)
def test_any_header_value_is_read_or_refused(name: str, value: str) -> None:
    lines = [f"{key}: {value if key == name else content}" for key, content in HEADERS.items()]
    data = ("GET /acp HTTP/1.1\r\n" + "\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
    assert answered(data).startswith((b"HTTP/1.1 101", b"HTTP/1.1 4"))
