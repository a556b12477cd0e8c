from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from broker.session.fingerprint import changed, fingerprint, fingerprints

KEY = b"k" * 32
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def shuffled(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: shuffled(value[key]) for key in reversed(list(value))}
    if isinstance(value, list):
        return [shuffled(item) for item in value]
    return value


@given(values)
def test_key_order_never_matters(value: Any) -> None:
    assert fingerprint(KEY, "p", value) == fingerprint(KEY, "p", shuffled(value))


@given(st.dictionaries(st.text(), st.integers(), min_size=1))
def test_white_space_never_matters(value: dict[str, int]) -> None:
    assert fingerprint(KEY, "p", json.loads(json.dumps(value, indent=7))) == fingerprint(KEY, "p", value)


@given(values, values)
def test_different_values_differ(one: Any, other: Any) -> None:
    same = json.dumps(one, sort_keys=True, default=repr) == json.dumps(other, sort_keys=True, default=repr)
    assert (fingerprint(KEY, "p", one) == fingerprint(KEY, "p", other)) == same


def test_the_key_and_the_part_matter() -> None:
    assert fingerprint(KEY, "p", 1) != fingerprint(b"x" * 32, "p", 1)
    assert fingerprint(KEY, "p", 1) != fingerprint(KEY, "q", 1)


def test_only_the_parts_that_differ_are_named() -> None:
    wanted = fingerprints(KEY, {"mcp": [1], "process": {"a": 1}, "settings": {}})
    applied = wanted | {"mcp": "old"}
    assert changed(applied, wanted) == {"mcp"}
    assert changed(wanted, wanted) == set()
    assert changed({}, wanted) == {"mcp", "process", "settings"}
