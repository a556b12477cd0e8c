from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_agent import jsonrpc

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["params", "_meta", "id", '"params":{', "x"]) | st.text(max_size=4), inner, max_size=3
        )
    ),
    max_leaves=12,
)
OBJECT = st.dictionaries(
    st.sampled_from(["_meta", "params", "sessionId", "update"]) | st.text(max_size=4), JSON, max_size=4
)


@given(OBJECT, st.sampled_from([(",", ":"), (", ", ": ")]), st.booleans(), st.booleans())
def test_splicing_gives_what_writing_anew_gives(
    params: dict[str, Any], separators: tuple[str, str], params_first: bool, ascii_only: bool
) -> None:
    message: dict[str, Any] = {"jsonrpc": "2.0", "method": "session/update", "other": {"params": {}}}
    message = {"params": params, **message} if params_first else {**message, "params": params}
    raw = json.dumps(message, separators=separators, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    try:
        parsed = jsonrpc.parse(raw)
    except ValueError:
        return  # a lone surrogate, which is not UTF-8
    spliced = json.loads(jsonrpc.spliced(raw, parsed, 5, 9))
    assert spliced == json.loads(jsonrpc.stamped(parsed, 5, 9))
    assert spliced["params"]["_meta"]["cortex"] == {"epoch": 5, "seq": 9}


def test_the_usual_update_is_spliced_without_being_written_anew() -> None:
    raw = b'{"jsonrpc": "2.0", "method": "session/update", "params": {"sessionId":"s",  "update": {}}}'
    assert b'"sessionId":"s",  "update": {}}}' in jsonrpc.spliced(raw, jsonrpc.parse(raw), 1, 2)
    empty = b'{"method":"x","params":{}}'
    assert json.loads(jsonrpc.spliced(empty, jsonrpc.parse(empty), 1, 2))["params"] == {
        "_meta": {"cortex": {"epoch": 1, "seq": 2}}
    }


def test_a_second_params_gets_no_unstamped_message_through() -> None:
    raw = b'{"method":"x","params":{"a":1},"params":{"b":2}}'
    out = json.loads(jsonrpc.spliced(raw, jsonrpc.parse(raw), 1, 2))
    assert out["params"]["b"] == 2
    assert out["params"]["_meta"]["cortex"]["seq"] == 2


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "NaN",
        '{"a":Infinity}',
        "1e999",
        "[" * 100_000,
        "9" * 5000,
        '"\x01"',
        "",
        '{"a":1}x',
        b"\xff",
        b"\xff\xfe1\x00",
    ],
)
def test_what_is_not_json_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError):
        jsonrpc.parse(text)


@given(JSON)
def test_dumps_is_one_line_of_utf8_that_parses_back(value: Any) -> None:
    text = jsonrpc.dumps(value)
    assert b"\n" not in text
    assert jsonrpc.parse(text) == value


def test_a_lone_surrogate_stays_an_escape() -> None:
    assert jsonrpc.dumps("\ud800") == b'"\\ud800"'


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ({"id": 1, "method": "a"}, "request"),
        ({"id": None, "method": "a", "params": []}, "request"),
        ({"method": "a"}, "notification"),
        ({"id": "x", "result": None}, "response"),
        ({"id": 1.5, "error": {}}, "response"),
    ],
)
def test_kinds(message: dict[str, Any], kind: str) -> None:
    assert jsonrpc.kind(message) == kind


@pytest.mark.parametrize(
    "message",
    [[], [{"id": 1, "method": "a"}], 1, None, {}, {"id": 1}, {"id": True, "method": "a"}, {"id": {}, "method": "a"},
     {"method": 1}, {"id": 1, "method": None}, {"id": 1, "result": 1, "error": {}}, {"jsonrpc": "1.0", "method": "a"},
     {"method": "a", "params": 1}, {"id": "x" * 2000, "method": "a"}],
)  # fmt: skip
def test_what_is_no_message_is_a_value_error(message: Any) -> None:
    with pytest.raises(ValueError):
        jsonrpc.kind(message)


def test_error_data_that_is_no_object_is_kept() -> None:
    body = json.loads(jsonrpc.response(1, {"error": {"code": 1, "message": "x", "data": "why"}}, 2, 3))
    assert body["error"]["data"] == {"value": "why", "cortex": {"epoch": 2, "seq": 3}}
    body = json.loads(jsonrpc.response(1, {"error": "boom"}, 2, 3))
    assert body["error"]["code"] == jsonrpc.INTERNAL_ERROR
