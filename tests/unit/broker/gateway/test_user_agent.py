from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.gateway.user_agent import tool_of


def user(text: str) -> bytes:
    return b"Basic " + base64.b64encode(text.encode())


@pytest.mark.parametrize(
    ("headers", "tool"),
    [
        ([], ""),
        ([(b"User-Agent", b"git/2.39.5")], "git"),
        ([(b"user-agent", b"curl/8.0")], "curl"),
        ([(b"User-Agent", b"Debian APT-HTTP/1.3 (2.6.1)")], "apt"),
        ([(b"User-Agent", b"Apache-Maven/3.9.6 (Java 17)")], "mvn"),
        ([(b"User-Agent", b"Apache-HttpClient/4.5.14 (Java/17.0.15)")], "java"),
        ([(b"User-Agent", b"Go-http-client/1.1")], "go"),
        ([(b"Proxy-Authorization", user("pip:"))], "pip"),
        ([(b"Proxy-Authorization", user("npm:")), (b"User-Agent", b"node/22")], "node"),
        ([(b"Proxy-Authorization", b"Bearer x")], ""),
        ([(b"Proxy-Authorization", b"Basic !!!")], ""),
        ([(b"Proxy-Authorization", user("a b:"))], ""),
        ([(b"User-Agent", b"<script>")], ""),
    ],
)
def test_the_name_of_a_tool(headers: list[tuple[bytes, bytes]], tool: str) -> None:
    assert tool_of(headers) == tool


@given(st.sampled_from([b"User-Agent", b"Proxy-Authorization"]), st.binary(max_size=80))
def test_whatever_is_sent_the_name_is_short_and_plain(name: bytes, value: bytes) -> None:
    for sent in (value, b"Basic " + value, b"Basic " + base64.b64encode(value)):
        tool = tool_of([(name, sent)])
        assert len(tool) <= 32
        assert tool.isascii()
        assert tool.isprintable()
        assert not set(tool) & set(" \"'<>|;")
