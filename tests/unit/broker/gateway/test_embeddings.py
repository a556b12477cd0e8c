"""Requests put together and taken apart: each gets the embeddings of its inputs, and no token is lost or made."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.gateway.embeddings import Asked, merged, read, shared_out, split

Text = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
Tokens = st.lists(st.integers(0, 100_000), min_size=1, max_size=4)
Texts = st.lists(Text | st.lists(Text, min_size=1, max_size=4), min_size=1, max_size=6)
Numbers = st.lists(Tokens | st.lists(Tokens, min_size=1, max_size=4), min_size=1, max_size=6)


def request(given_input: Any, **fields: Any) -> bytes:
    return json.dumps({"model": "e", "input": given_input, **fields}).encode()


def asked(given_input: Any, **fields: Any) -> Asked:
    found = read(request(given_input, **fields), 64)
    assert found is not None
    return found


def listed(given_input: Any) -> list[Any]:
    single = isinstance(given_input, str) or not isinstance(given_input[0], str | list)
    return [given_input] if single else list(given_input)


def answered(body: bytes, tokens: int, backwards: bool = False) -> bytes:
    """What a provider says; the embedding of an input is its text, with more digits than a float keeps."""
    data = [
        {"object": "embedding", "index": index, "embedding": [each]}
        for index, each in enumerate(json.loads(body)["input"])
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens, "details": {"cached": tokens // 2}}
    whole = {"object": "list", "model": "e-1", "data": data[::-1] if backwards else data, "usage": usage}
    return json.dumps(whole).encode()


@given(Texts | Numbers, st.integers(0, 1000), st.booleans())
def test_each_gets_its_own_and_tokens_add_up(inputs: list[Any], tokens: int, backwards: bool) -> None:
    members = [asked(each, dimensions=3) for each in inputs]
    assert len({each.kind for each in members}) == 1
    whole = merged(members)
    assert json.loads(whole) == {
        "model": "e",
        "dimensions": 3,
        "input": [one for each in inputs for one in listed(each)],
    }
    parts = split(answered(whole, tokens, backwards), members)
    assert parts is not None
    answers = [json.loads(part) for part in parts]
    for each, answer in zip(inputs, answers, strict=True):
        assert answer["model"] == "e-1"
        assert [item["embedding"] for item in answer["data"]] == [[one] for one in listed(each)]
        assert [item["index"] for item in answer["data"]] == list(range(len(listed(each))))
    for path in (("prompt_tokens",), ("total_tokens",), ("details", "cached")):
        shares = [answer["usage"][path[0]] for answer in answers]
        shares = [share[path[1]] for share in shares] if len(path) > 1 else shares
        assert sum(shares) == (tokens // 2 if len(path) > 1 else tokens)
        assert all(share >= 0 for share in shares)


@given(st.integers(0, 10**9), st.lists(st.integers(0, 10**6), min_size=1, max_size=50))
def test_shares_are_in_proportion_and_add_up(total: int, sizes: list[int]) -> None:
    if not sum(sizes):
        sizes[0] = 1
    shares = shared_out(total, sizes)
    assert sum(shares) == total
    for share, size in zip(shares, sizes, strict=True):
        assert abs(share - total * size / sum(sizes)) < 1.001


def test_digits_stay_as_they_were_spelled() -> None:
    body = b'{"data":[{"index":0,"embedding":[0.10000000000000000555,1e-7,-0.0]},{"index":1,"embedding":"AAAA"}]}'
    parts = split(body, [asked("a"), asked("b")])
    assert parts is not None
    assert b"[0.10000000000000000555,1e-7,-0.0]" in parts[0]
    assert json.loads(parts[1]) == {"data": [{"index": 0, "embedding": "AAAA"}]}


def test_what_differs_but_for_the_input_is_of_another_kind() -> None:
    kinds = [asked("a").kind, asked("a", user="u").kind, asked("a", dimensions=2).kind, asked([1]).kind]
    assert len(set(kinds)) == 4
    assert asked("a", user="u", dimensions=2).kind == asked(["b", "c"], dimensions=2, user="u").kind


@pytest.mark.parametrize(
    "body",
    [
        b"", b"[]", b"nonsense", b'{"input":"a"}', b'{"model":"e"}', b'{"model":"e","input":"a","input":"b"}',
        request([]), request([[]]), request({}), request(None), request([1.5]), request([True]), request(["a", [1]]),
        request(["a", 1]), request("a", stream=True), request(["a"] * 65), request("a" * 2**20),
    ],
)  # fmt: skip
def test_what_cannot_go_with_others_goes_alone(body: bytes) -> None:
    assert read(body, 64) is None


@pytest.mark.parametrize(
    "answer",
    [
        b"", b"[]", b"{}", b'{"data":[]}', b'{"data":[{"index":0}]}', b'{"data":[{"index":0},{"index":0}]}',
        b'{"data":[{"index":0},{"index":2}]}', b'{"data":[{"index":0},{"index":"1"}]}', b'{"data":[{},{}]}',
        b'{"data":[{"index":0},{"index":1},{"index":2}]}', b'{"data":[{"index":0},{"index":1}],"usage":3}',
    ],
)  # fmt: skip
def test_what_is_no_answer_to_all_is_not_taken_apart(answer: bytes) -> None:
    assert split(answer, [asked("a"), asked("b")]) is None
