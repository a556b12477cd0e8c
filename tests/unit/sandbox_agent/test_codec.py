from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox_agent.wire import codec

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.binary(max_size=40) | st.text(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
MAPS = st.dictionaries(st.text(max_size=8), VALUES, max_size=5)


@settings(max_examples=40)
@given(st.lists(MAPS, max_size=4), st.integers(1, 9))
def test_messages_survive_any_cut_of_the_stream(messages: list[dict[str, object]], step: int) -> None:
    data = b"".join(codec.pack(message) for message in messages)
    decoder = codec.Decoder()
    got = []
    for start in range(0, len(data), step):
        got += decoder.feed(data[start : start + step])
    assert got == messages


@given(st.binary(max_size=60))
def test_garbage_is_a_wire_error_or_a_map(data: bytes) -> None:
    with contextlib.suppress(codec.WireError):
        assert isinstance(codec.unpack(data), dict)


def test_a_length_over_the_limit_is_refused_before_the_body() -> None:
    with pytest.raises(codec.WireError):
        codec.Decoder(limit=10).feed(b"\x00\x00\x00\x0b")
    with pytest.raises(codec.WireError):
        codec.pack({"x": b"0" * 20}, limit=10)


@pytest.mark.parametrize("body", [b"\x90", b"\x01", b"\x81\x01\x02", b"\x82\xa1a", b"\x80\x80", b"\xc1"])
def test_not_one_map_with_string_keys(body: bytes) -> None:
    with pytest.raises(codec.WireError):
        codec.unpack(body)


@pytest.mark.parametrize("value", [2**64, -(2**63) - 1, "\ud83d", object()])
def test_what_msgpack_does_not_know_is_a_wire_error(value: object) -> None:
    with pytest.raises(codec.WireError):
        codec.pack({"x": value})
