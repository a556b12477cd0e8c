"""Routes: where a path leads, which headers go along, whose credential."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import Code, CortexError
from broker.gateway.heads import RequestHead, parse_request, parse_response
from broker.gateway.messages import Provider, Scheme
from broker.gateway.policy import Kind
from broker.gateway.routes import (
    Route,
    compile_routes,
    find_route,
    passed,
    proxy_route,
    request_head,
    response_head,
    strip_keys,
)

KEY = "sk-real"


def routes(kind: Kind = "anthropic", url: str = "https://api.example/base", key: str = KEY) -> dict[bytes, Route]:
    return compile_routes({"p": Provider(kind, url, key)})


def asked(route: Route, head: RequestHead, there: bytes) -> bytes:
    """What the provider gets."""
    return request_head(route.spot, head.method, there, route.credential, passed(route, head))


def through(lines: bytes, kind: Kind = "anthropic", target: bytes = b"/p/v1/x", key: str = KEY) -> list[bytes]:
    head = parse_request(b"POST " + target + b" HTTP/1.1\r\nHost: sandbox\r\n" + lines + b"\r\n")
    route, there = find_route(routes(kind, key=key), head.target)
    return asked(route, head, there).split(b"\r\n")


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("anthropic", b"x-api-key: sk-real"),
        ("openai", b"authorization: Bearer sk-real"),
        ("gemini", b"x-goog-api-key: sk-real"),
        ("ollama", b"authorization: Bearer sk-real"),
    ],
)
def test_the_credential_goes_in_by_kind_and_nothing_else_does(kind: Kind, line: bytes) -> None:
    stolen = (
        b"Authorization: Bearer a\r\nAUTHORIZATION: b\r\nX-Api-Key: c\r\nx-goog-api-key: d\r\nCookie: e\r\n"
        b"Proxy-Authorization: f\r\napi-key: g\r\nAnthropic-Version: 1\r\nX-Unknown: 2\r\n"
    )
    got = through(stolen, kind)
    assert got == [
        b"POST /base/v1/x HTTP/1.1", b"host: api.example", line, b"Anthropic-Version: 1", b"X-Unknown: 2", b"", b"",
    ]  # fmt: skip


def test_without_a_credential_none_goes_in() -> None:
    assert through(b"Authorization: a\r\n", "ollama", key="") == [
        b"POST /base/v1/x HTTP/1.1",
        b"host: api.example",
        b"",
        b"",
    ]


def sent(provider: Provider, lines: bytes, target: bytes = b"/p/v1/x") -> list[bytes]:
    head = parse_request(b"POST " + target + b" HTTP/1.1\r\nHost: sandbox\r\n" + lines + b"\r\n")
    route, there = find_route(compile_routes({"p": provider}), head.target)
    return [line for line in asked(route, head, there).split(b"\r\n") if line]


OWN = (
    b"Authorization: Bearer own\r\nX-Api-Key: own\r\nx-goog-api-key: own\r\napi-key: own\r\nx-auth-token: own\r\n"
    b"Cookie: c\r\nProxy-Authorization: p\r\n"
)


@pytest.mark.parametrize("kind", ["anthropic", "openai", "gemini", "ollama"])
def test_an_oauth_token_goes_in_as_a_bearer_whatever_the_kind(kind: Kind) -> None:
    got = sent(Provider(kind, "https://h", "at-1", scheme="bearer"), OWN)
    assert got == [b"POST /v1/x HTTP/1.1", b"host: h", b"authorization: Bearer at-1"]


def test_where_the_cli_has_its_own_credentials_they_pass_and_nothing_is_put_in() -> None:
    got = sent(Provider("anthropic", "https://h", scheme="passthrough"), OWN, b"/p/v1/x?key=own&alt=sse")
    assert got[:2] == [b"POST /v1/x?key=own&alt=sse HTTP/1.1", b"host: h"]
    names = [line.partition(b":")[0].lower() for line in got[2:]]
    assert names == [b"authorization", b"x-api-key", b"x-goog-api-key", b"api-key", b"x-auth-token"]


ACCOUNT = (
    b"OpenAI-Organization: o\r\nopenai-project: o\r\nChatGPT-Account-Id: o\r\nanthropic-workspace-id: o\r\n"
    b"X-Goog-User-Project: o\r\nX-HF-Bill-To: o\r\nX-DashScope-WorkSpace: o\r\n"
)


@pytest.mark.parametrize("credential", ["k", ""])
@pytest.mark.parametrize("scheme", ["key", "bearer"])
def test_a_sandbox_does_not_choose_who_pays(scheme: Scheme, credential: str) -> None:
    target = b"/p/v1/x?userProject=o&%24userproject=o&alt=sse"
    got = sent(Provider("openai", "https://h", credential, scheme=scheme), ACCOUNT, target)
    assert got[0] == b"POST /v1/x?alt=sse HTTP/1.1"
    assert not [line for line in got if line.endswith(b": o")]


def test_whose_account_pays_is_the_owners_choice() -> None:
    provider = Provider("openai", "https://h", "k", headers={"OpenAI-Organization": "ours"})
    assert sent(provider, ACCOUNT)[2:] == [b"authorization: Bearer k", b"openai-organization: ours"]
    own = sent(Provider("openai", "https://h", scheme="passthrough"), ACCOUNT, b"/p/v1/x?userProject=o")
    assert own == [b"POST /v1/x?userProject=o HTTP/1.1", b"host: h", *ACCOUNT.split(b"\r\n")[:-1]]


def test_only_that_provider_lets_them_pass() -> None:
    table = compile_routes(
        {"own": Provider("anthropic", "https://h", scheme="passthrough"), "other": Provider("anthropic", "https://h")}
    )
    head = parse_request(b"POST /other/x?key=own HTTP/1.1\r\nHost: s\r\n" + OWN + b"\r\n")
    route, there = find_route(table, head.target)
    assert asked(route, head, there) == b"POST /x HTTP/1.1\r\nhost: h\r\n\r\n"


def test_extra_headers_go_in_and_lists_are_joined() -> None:
    provider = Provider(
        "anthropic", "https://h", "at-1", scheme="bearer",
        headers={"Anthropic-Beta": "oauth-2025-04-20", "ChatGPT-Account-Id": "acc"},
    )  # fmt: skip
    got = sent(provider, b"Anthropic-Beta: a, oauth-2025-04-20\r\nanthropic-beta: b\r\nchatgpt-account-id: other\r\n")
    assert got[1:] == [
        b"host: h", b"authorization: Bearer at-1", b"chatgpt-account-id: acc", b"anthropic-beta: a,oauth-2025-04-20,b",
    ]  # fmt: skip
    assert sent(provider, b"")[-1] == b"anthropic-beta: oauth-2025-04-20"


@pytest.mark.parametrize(
    "changes",
    [
        {"scheme": "basic"},
        {"scheme": "passthrough", "credential": "k"},
        {"headers": {"authorization": "x"}},
        {"headers": {"Host": "x"}},
        {"headers": {"a b": "x"}},
        {"headers": {"a": "x\r\nb: c"}},
    ],
)
def test_a_scheme_or_header_that_cannot_be_is_refused_and_its_value_not_told(changes: dict[str, Any]) -> None:
    with pytest.raises(CortexError) as caught:
        compile_routes({"p": Provider("anthropic", "https://h", **changes)})
    assert caught.value.code is Code.BAD_CONFIG
    assert "provider p" in str(caught.value)
    assert "b: c" not in str(caught.value)


def test_neither_credential_nor_headers_are_shown() -> None:
    provider = Provider("openai", "https://h", "sk-shown", headers={"x-account": "acc-shown"})
    assert "shown" not in repr(provider) + repr(compile_routes({"p": provider}))


def test_hop_by_hop_headers_stay_here() -> None:
    got = through(b"Connection: keep-alive, X-Drop\r\nX-Drop: 1\r\nTE: trailers\r\nUpgrade: h2c\r\nExpect: x\r\n")
    assert got == [b"POST /base/v1/x HTTP/1.1", b"host: api.example", b"x-api-key: sk-real", b"", b""]


def test_connection_cannot_take_the_credential_or_the_framing_away() -> None:
    got = through(b"Connection: x-api-key, content-length, host\r\nContent-Length: 3\r\n")
    assert b"x-api-key: sk-real" in got
    assert b"content-length: 3" in got
    assert b"host: api.example" in got


@pytest.mark.parametrize(
    ("target", "there"),
    [
        (b"/p/v1/messages?beta=true", b"/base/v1/messages?beta=true"),
        (b"/p", b"/base/"),
        (b"/p/", b"/base/"),
        (b"/p//x", b"/base//x"),
        (b"/p/v1beta/m:stream?alt=sse&key=AIza", b"/base/v1beta/m:stream?alt=sse"),
        (b"/p/x?key=1", b"/base/x"),
        (b"/p/x?%6Bey=1&a=b&KEY=2", b"/base/x?a=b"),
        (b"/p/x?monkey=1&keys=2", b"/base/x?monkey=1&keys=2"),
        (b"/p/a%20b/c.d/...", b"/base/a%20b/c.d/..."),
        (b"/p/x?a=../..", b"/base/x?a=../.."),
    ],
)  # fmt: skip
def test_paths(target: bytes, there: bytes) -> None:
    route, behind = find_route(routes(), target)
    assert route.spot.base_path + behind == there


@pytest.mark.parametrize(
    "target",
    [b"/p/../x", b"/p/a/..", b"/p/./x", b"/p/%2e%2e/x", b"/p/.%2E/x", b"/p/..%2fx", b"/p/..\\x", b"/p/%252e%252e/x",
     b"/p/a%2f..%2fb", b"/p/..;/x", b"/p/..%3bv=1/x"],
)  # fmt: skip
def test_paths_that_climb_are_refused(target: bytes) -> None:
    with pytest.raises(CortexError) as caught:
        find_route(routes(), target)
    assert caught.value.code is Code.BAD_REQUEST


@pytest.mark.parametrize(
    ("target", "code"),
    [(b"/q/x", Code.UNKNOWN_PROVIDER), (b"/", Code.UNKNOWN_PROVIDER), (b"*", Code.BAD_REQUEST),
     (b"http://p/x", Code.BAD_REQUEST), (b"//p/x", Code.UNKNOWN_PROVIDER)],
)  # fmt: skip
def test_targets_that_lead_nowhere(target: bytes, code: Code) -> None:
    with pytest.raises(CortexError) as caught:
        find_route(routes(), target)
    assert caught.value.code is code


@pytest.mark.parametrize(
    "url",
    ["http://", "https://user:pw@h", "https://h?x", "https://h#x", "ftp://h", "https://h:0", "https://h /x",
     "https://h/\r\nx: y", "//h", "https://[::1", "https://h\u00e9"],
)  # fmt: skip
def test_bad_base_urls_never_tell_the_credential(url: str) -> None:
    with pytest.raises(CortexError) as caught:
        routes(url=url)
    assert KEY not in str(caught.value.problem())


@pytest.mark.parametrize("key", ["a\r\nb", "a\nb", "k\u00e9y", "a\x00"])
def test_credentials_that_would_break_a_header(key: str) -> None:
    with pytest.raises(CortexError) as caught:
        routes(key=key)
    assert key not in str(caught.value.problem())


def test_a_route_does_not_print_its_credential() -> None:
    provider = Provider("openai", "https://h", KEY)
    assert KEY not in repr(provider) + repr(compile_routes({"p": provider}))


@pytest.mark.parametrize(
    ("url", "host"),
    [("https://h", b"h"), ("https://h:443", b"h"), ("http://h:443", b"h:443"), ("http://[::1]:80/x", b"[::1]")],
)
def test_host_header(url: str, host: bytes) -> None:
    assert routes(url=url, key="")[b"p"].spot.host_line == b"host: " + host + b"\r\n"


def test_a_response_loses_what_is_not_the_sandboxs() -> None:
    head = parse_response(
        b"HTTP/1.1 200 OK\r\nSet-Cookie: a\r\nConnection: close, X-Hop\r\nX-Hop: 1\r\nanthropic-organization-id: o\r\n"
        b"Retry-After: 3\r\nContent-Length: 5\r\n\r\n"
    )
    assert response_head(head, chunked=False, close=False) == (
        b"HTTP/1.1 200 OK\r\nRetry-After: 3\r\ncontent-length: 5\r\n\r\n"
    )
    assert response_head(head, chunked=True, close=True) == (
        b"HTTP/1.1 200 OK\r\nRetry-After: 3\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n"
    )


@pytest.mark.parametrize(
    ("target", "authority", "path"),
    [
        (b"http://h/x", "h", b"/x"),
        (b"HTTP://H:8080?a", "h:8080", b"/?a"),
        (b"http://h", "h", b"/"),
        (b"http://h/a?b=http://c", "h", b"/a?b=http://c"),
    ],
)
def test_plain_proxy_targets(target: bytes, authority: str, path: bytes) -> None:
    found = proxy_route(target, private=False)
    assert found is not None
    assert (found[0].spot.origin.authority, found[1]) == (authority, path)
    assert not found[0].spot.origin.pooled


@pytest.mark.parametrize("target", [b"https://h/x", b"ftp://h", b"http://u:p@h/", b"http:///x", b"/x", b"http://h:x/"])
def test_what_is_no_plain_proxy_target(target: bytes) -> None:
    assert proxy_route(target, private=False) is None


@given(st.lists(st.binary(max_size=12).filter(lambda part: b"&" not in part)))
def test_keys_are_stripped_and_the_rest_stays(parts: list[bytes]) -> None:
    query = b"&".join([*parts, b"key=secret", b"OAUTH_token=secret", b"bearer%5ftoken=secret"])
    assert b"secret" not in strip_keys(query)
    assert strip_keys(strip_keys(query)) == strip_keys(query)
