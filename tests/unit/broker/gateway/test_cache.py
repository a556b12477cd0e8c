"""Equal questions have one key, others their own; what must not be given twice has none; memory is bounded."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.gateway.cache import OVERHEAD, PIECE_OVERHEAD, Lru, Recorded, asked, canonical, recorded, said, wants
from broker.gateway.caller import Endpoint, endpoint_of
from broker.gateway.heads import parse_response
from broker.gateway.policy import CacheRule

RULE = CacheRule(enabled=True)
MESSAGES = b"/v1/messages"
Json = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab\"\\:{é", max_size=3), inner, max_size=3),
    max_leaves=12,
)  # fmt: skip


def shuffled(value: Any, draw: Callable[[Any], Any]) -> Any:
    """The same with the keys of all objects in another order."""
    if isinstance(value, dict):
        return {key: shuffled(value[key], draw) for key in draw(st.permutations(list(value)))}
    return [shuffled(each, draw) for each in value] if isinstance(value, list) else value


def same(one: Any, other: Any) -> bool:
    """Equal as JSON: 1, 1.0 and true are three things, and so are 0.0 and -0.0."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


@given(st.data(), Json, st.sampled_from([None, 2]), st.booleans())
def test_neither_order_nor_white_space_nor_escapes_matter(
    data: st.DataObject, value: Any, indent: int | None, plain: bool
) -> None:
    one = canonical(json.dumps(value).encode())
    other = canonical(json.dumps(shuffled(value, data.draw), indent=indent, ensure_ascii=plain).encode())
    assert one is not None
    assert other is not None
    assert one[1] == other[1]
    assert same(json.loads(one[1]), value)


@given(Json, Json)
def test_different_values_are_spelled_differently(one: Any, other: Any) -> None:
    texts = [canonical(json.dumps(each).encode()) for each in (one, other)]
    assert texts[0] is not None
    assert texts[1] is not None
    assert (texts[0][1] == texts[1][1]) == same(one, other)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"nonsense", b'{"a":1}x', b'{"a":NaN}', b'"\xff"', rb'{"a":"\ud800"}', b"1e999", b"[" * 100_000,
        b'{"a":1,"a":2}', b'{"x":{"a":1,"a":1}}', rb'{"a":1,"\u0061":2}',
        rb'{"a":"\\","a":"\"}"}', rb' {"a:":"\":","a:":":"}',
    ],
)  # fmt: skip
def test_what_two_readers_could_differ_about_has_no_spelling(body: bytes) -> None:
    assert canonical(body) is None


def key(body: dict[str, Any], target: bytes = MESSAGES, rule: CacheRule = RULE) -> bytes | None:
    return asked(rule, endpoint_of(b"POST", target), b"POST", target, json.dumps(body).encode())


PLAIN: dict[str, Any] = {"model": "m", "temperature": 0, "messages": [{"role": "user", "content": "hi"}]}
GEMINI = b"/v1beta/models/g:generateContent"
CODE_ASSIST = b"/v1internal:streamGenerateContent?alt=sse"


@pytest.mark.parametrize(
    ("target", "body"),
    [
        (MESSAGES, PLAIN),
        (MESSAGES, {**PLAIN, "temperature": 0.0, "stream": True, "n": 1, "tools": []}),
        (GEMINI, {"generationConfig": {"temperature": 0}}),
        (GEMINI, {"generation_config": {"temperature": 0, "candidate_count": 1}}),
        (CODE_ASSIST, {"model": "g", "request": {"generationConfig": {"temperature": 0}}}),
        (b"/api/chat", {"model": "m", "options": {"temperature": 0}}),
        (b"/v1/embeddings", {"model": "m", "input": "x"}),
        (b"/v1/messages/count_tokens", {"model": "m", "tools": [{"name": "t"}]}),
    ],
)
def test_certain_answers_are_shared(target: bytes, body: dict[str, Any]) -> None:
    assert key(body, target) is not None


@pytest.mark.parametrize(
    ("target", "body"),
    [
        (MESSAGES, {"model": "m"}),
        (MESSAGES, {**PLAIN, "temperature": 0.1}),
        (MESSAGES, {**PLAIN, "temperature": None}),
        (MESSAGES, {**PLAIN, "temperature": False}),
        (MESSAGES, {**PLAIN, "temperature": "0"}),
        (MESSAGES, {"model": "m", "seed": 7}),
        (MESSAGES, {**PLAIN, "n": 2}),
        (b"/v1/completions", {**PLAIN, "best_of": 3}),
        (GEMINI, {"temperature": 0}),
        (GEMINI, {"generationConfig": {"temperature": 0}, "generation_config": {"temperature": 1}}),
        (GEMINI, {"generationConfig": {"temperature": 0, "candidateCount": 2}}),
        (CODE_ASSIST, {"model": "g", "request": {}}),
        (CODE_ASSIST, {"model": "g", "request": 1}),
        (b"/api/chat", {"model": "m", "temperature": 0}),
        (b"/api/generate", {"model": "m", "options": [0]}),
    ],
)
def test_random_answers_are_shared_only_on_demand(target: bytes, body: dict[str, Any]) -> None:
    assert key(body, target) is None
    if isinstance(body.get("request", {}), dict):
        assert key(body, target, CacheRule(enabled=True, with_randomness=True)) is not None


@pytest.mark.parametrize("name", ["tools", "functions", "mcp_servers", "web_search_options"])
def test_requests_with_tools_are_shared_only_on_demand(name: str) -> None:
    body = {**PLAIN, name: [{"name": "t"}]}
    assert key(body) is None
    assert key(body, rule=CacheRule(enabled=True, with_tools=True)) is not None


LOOSE = CacheRule(enabled=True, with_tools=True, with_randomness=True)


@pytest.mark.parametrize("name", ["previous_response_id", "conversation", "background"])
def test_what_depends_on_the_providers_memory_is_never_shared(name: str) -> None:
    assert key({**PLAIN, name: "x"}, b"/v1/responses", LOOSE) is None


def test_calls_that_only_look_like_questions_are_not_shared() -> None:
    assert key({"role": "user", "content": "hi"}, b"/v1/threads/t/messages", LOOSE) is None
    assert key(PLAIN, b"/v1/messages/batches", LOOSE) is None
    assert asked(LOOSE, Endpoint.GENERATE, b"POST", MESSAGES, b"[]") is None
    assert asked(LOOSE, Endpoint.GENERATE, b"PUT", MESSAGES, json.dumps(PLAIN).encode()) is None
    assert asked(LOOSE, Endpoint.LIST, b"GET", b"/v1/models", b"x") is None


@pytest.mark.parametrize(
    "change", [{"model": "n"}, {"stream": True}, {"stream": False}, {"x": None}, {"temperature": 0.0}]
)
def test_every_field_counts(change: dict[str, Any]) -> None:
    assert len({key(PLAIN), key({**PLAIN, **change}), None}) == 3


def test_the_path_and_the_query_count_and_credentials_in_it_do_not() -> None:
    lists = [
        b"/v1/models",
        b"/v1/models?limit=2",
        b"/v1/models?key=a",
        b"/v1/models?key=b",
        b"/v1/models?limit=2&key=b",
    ]
    keys = [asked(RULE, Endpoint.LIST, b"GET", target, b"") for target in lists]
    assert None not in keys
    assert keys[0] != keys[1] == keys[4]
    assert keys[2] == keys[3]


def test_headers_that_change_answers_count() -> None:
    assert said([(b"User-Agent", b"a"), (b"x-session-id", b"1"), (b"authorization", b"x")]) == []
    for name in (
        b"accept",
        b"anthropic-version",
        b"anthropic-beta",
        b"openai-beta",
        b"content-type",
        b"Accept-Encoding",
    ):
        assert said([(name, b"a")]) != said([(name, b"b")]) != said([])
    assert said([(b"anthropic-beta", b"a, b")]) == said([(b"Anthropic-Beta", b"b"), (b"anthropic-beta", b"a")])
    assert said([(b"accept", b"a"), (b"openai-beta", b"b")]) == said([(b"openai-beta", b"b"), (b"accept", b"a")])


@pytest.mark.parametrize(
    "header",
    [(b"Cache-Control", b"No-Cache"), (b"pragma", b"no-cache"), (b"range", b"bytes=0-1"), (b"if-none-match", b"x")],
)
def test_who_wants_a_fresh_answer_gets_one(header: tuple[bytes, bytes]) -> None:
    assert said([header]) is None
    assert said([(b"cache-control", b"max-age=0")]) == []


def test_only_what_may_be_kept_is_looked_at() -> None:
    assert wants(RULE, Endpoint.GENERATE, b"POST")
    assert wants(RULE, Endpoint.LIST, b"GET")
    assert not wants(RULE, Endpoint.LIST, b"HEAD")
    assert not wants(RULE, Endpoint.OTHER, b"POST")
    assert not wants(CacheRule(), Endpoint.GENERATE, b"POST")


def test_headers_about_one_call_are_not_kept() -> None:
    head = parse_response(
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nSet-Cookie: a=b\r\nrequest-id: 1\r\n"
        b"X-Request-Id: 2\r\ncf-ray: 3\r\nanthropic-ratelimit-requests-remaining: 4\r\n"
        b"anthropic-organization-id: o\r\ndate: now\r\n"
        b"retry-after: 5\r\ncontent-length: 7\r\n\r\n"
    )
    answer = recorded(head)
    assert answer.headers == [(b"Content-Type", b"application/json")]
    assert (answer.chunked, answer.length) == (False, 7)
    assert answer.marked(b"hit", 2.9).headers[1:] == [(b"x-cortex-cache", b"hit"), (b"age", b"2")]


def answer_of(size: int) -> Recorded:
    return Recorded(200, b"OK", [], [bytes(size)], False)


@given(
    st.integers(0, 20_000),
    st.lists(st.tuples(st.sampled_from("pgd"), st.binary(min_size=1, max_size=1), st.integers(0, 6000)), max_size=60),
)
def test_memory_is_never_over_its_bound_and_gives_back_what_was_put(
    bound: int, steps: list[tuple[str, bytes, int]]
) -> None:
    lru, model = Lru(bound), dict[bytes, int]()
    for now, (what, name, size) in enumerate(steps):
        if what == "p":
            fits = size + OVERHEAD + PIECE_OVERHEAD <= bound
            assert lru.put(name, answer_of(size), now, 10) is fits
            model.pop(name, None)
            if fits:
                model[name] = size
        elif what == "d":
            lru.drop(name)
            model.pop(name, None)
        elif (found := lru.get(name, now)) is not None:
            assert sum(map(len, found[0].pieces)) == model[name]
            assert found[1] < 10
        assert lru.size <= bound
        assert lru.size >= len(lru) * OVERHEAD
    for name in list(model):
        lru.drop(name)
    assert (lru.size, len(lru)) == (0, 0)


def test_the_least_used_goes_first() -> None:
    lru = Lru(3 * answer_of(100).cost)
    for name in (b"a", b"b", b"c"):
        lru.put(name, answer_of(100), 0, 10)
    assert lru.get(b"a", 1) is not None
    lru.put(b"d", answer_of(100), 1, 10)
    assert [lru.get(name, 1) is not None for name in (b"a", b"b", b"c", b"d")] == [True, False, True, True]


def test_an_answer_lives_for_its_time() -> None:
    lru = Lru(10_000)
    lru.put(b"a", answer_of(1), 100, 5)
    found = lru.get(b"a", 104.9)
    assert found is not None
    assert found[1] == pytest.approx(4.9)
    assert lru.get(b"a", 105) is None
    assert lru.size == 0
