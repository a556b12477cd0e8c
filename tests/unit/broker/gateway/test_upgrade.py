"""The head of a WebSocket handshake that goes upstream."""

from __future__ import annotations

import pytest

from broker.errors import CortexError
from broker.gateway.heads import RequestHead, parse_request
from broker.gateway.upgrade import upgrade_head

KEY = b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"


def asked(*lines: bytes, method: bytes = b"GET", connection: bytes = b"keep-alive, Upgrade") -> RequestHead:
    return parse_request(
        b"%s /openai/v1/responses HTTP/1.1\r\nHost: x\r\nConnection: %s\r\nUpgrade: websocket\r\n%s\r\n"
        % (method, connection, b"".join(lines))
    )


def made(*lines: bytes, passed: bytes = b"", own_keys: bool = False) -> bytes:
    return upgrade_head(
        asked(*lines), b"/v1/responses", passed, b"host: up\r\nauthorization: Bearer k\r\n", own_keys=own_keys
    )


def test_handshake_credential_and_what_passes_are_put_together() -> None:
    passed = b"openai-beta: responses_websockets=2026-02-06\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    assert made(KEY, b"Sec-WebSocket-Version: 13\r\n", passed=passed) == (
        b"GET /v1/responses HTTP/1.1\r\n"
        b"host: up\r\nauthorization: Bearer k\r\n"
        b"openai-beta: responses_websockets=2026-02-06\r\n"
        b"connection: Upgrade\r\nupgrade: websocket\r\n"
        b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        b"sec-websocket-version: 13\r\n"
        b"\r\n"
    )


def test_no_extension_is_offered() -> None:
    offer = b"Sec-WebSocket-Extensions: permessage-deflate\r\n"
    assert b"permessage" not in made(KEY, offer, passed=offer)


def test_a_key_or_account_among_the_subprotocols_is_left_out_unless_the_sandboxs_own_keys_pass() -> None:
    offered = (
        b"Sec-WebSocket-Protocol: realtime, openai-insecure-api-key.sk-1\r\n"
        b"Sec-WebSocket-Protocol: OpenAI-Organization.o, openai-project.p, v2\r\n"
    )
    assert b"sec-websocket-protocol: realtime, v2\r\n" in made(KEY, offered)
    assert b"sk-1" not in made(KEY, offered, passed=offered)
    assert (
        b"sec-websocket-protocol: realtime, openai-insecure-api-key.sk-1, OpenAI-Organization.o, openai-project.p, v2"
        b"\r\n"
    ) in made(KEY, offered, own_keys=True)


@pytest.mark.parametrize(
    "head",
    [
        asked(KEY, b"Content-Length: 5\r\n"),
        asked(KEY, b"Transfer-Encoding: chunked\r\n"),
        asked(KEY, method=b"POST"),
        asked(KEY, connection=b"keep-alive"),
        asked(),
        asked(b"Sec-WebSocket-Key: \r\n"),
    ],
    ids=["length", "chunked", "POST", "no Connection", "no key", "empty key"],
)
def test_what_is_no_handshake_is_refused(head: RequestHead) -> None:
    with pytest.raises(CortexError) as refused:
        upgrade_head(head, b"/", b"", b"")
    assert refused.value.code.http_status == 400
