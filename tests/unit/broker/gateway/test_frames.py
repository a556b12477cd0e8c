"""Text in a stream of WebSocket frames: heard the same however it is cut, whatever else is in between."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.frames import Frame, Opcode

from broker.gateway.frames import TextListener

CUTS = st.lists(st.integers(0, 10**6), max_size=30)


def frame(opcode: Opcode, data: bytes, *, fin: bool = True) -> bytes:
    """As a server sends it, by a library that is not ours."""
    return Frame(opcode, data, fin=fin).serialize(mask=False)


def heard(raw: bytes, cuts: list[int], limit: int = 2**20) -> tuple[list[bytes], TextListener]:
    edges = sorted({cut % (len(raw) + 1) for cut in cuts} | {0, len(raw)})
    listener = TextListener(limit)
    return [text for start, end in pairwise(edges) for text in listener.feed(raw[start:end])], listener


PAYLOADS = st.one_of(
    st.binary(max_size=40),
    st.integers(120, 130).map(bytes),
    st.integers(65_530, 65_540).map(lambda size: b"x" * size),
)
MESSAGES = st.lists(
    st.tuples(
        st.sampled_from((Opcode.TEXT, Opcode.BINARY)),
        st.lists(PAYLOADS, min_size=1, max_size=4),
        st.lists(st.tuples(st.sampled_from((Opcode.PING, Opcode.PONG)), st.binary(max_size=125)), max_size=3),
    ),
    max_size=5,
)


def serialized(messages: list[tuple[Opcode, list[bytes], list[tuple[Opcode, bytes]]]]) -> bytes:
    raw = b""
    for opcode, parts, controls in messages:
        for number, part in enumerate(parts):
            raw += frame(Opcode.CONT if number else opcode, part, fin=number == len(parts) - 1)
            if number < len(controls):
                raw += frame(*controls[number])
    return raw


@given(MESSAGES, CUTS)
def test_text_is_heard_whole_whatever_the_cuts_and_fragments(
    messages: list[tuple[Opcode, list[bytes], list[tuple[Opcode, bytes]]]], cuts: list[int]
) -> None:
    found, listener = heard(serialized(messages), cuts)
    assert found == [b"".join(parts) for opcode, parts, _ in messages if opcode is Opcode.TEXT]
    assert not listener.deaf


def test_every_single_cut_gives_the_same() -> None:
    raw = frame(Opcode.TEXT, b"a" * 200) + frame(Opcode.TEXT, b"") + frame(Opcode.TEXT, b"b" * 70_000)
    raw += frame(Opcode.TEXT, b"c")
    expected = [b"a" * 200, b"", b"b" * 70_000, b"c"]
    for cut in [*range(220), *range(len(raw) - 20, len(raw))]:
        assert heard(raw, [cut])[0] == expected
    assert heard(raw[:400], list(range(400)))[0] == expected[:2]


@given(st.integers(0, 200), st.integers(1, 5), CUTS)
def test_of_a_message_over_the_limit_both_ends_are_heard_and_the_next_one(
    size: int, pieces: int, cuts: list[int]
) -> None:
    body = bytes(range(size))
    parts = [body[at * size // pieces : (at + 1) * size // pieces] for at in range(pieces)]
    raw = serialized([(Opcode.TEXT, parts, []), (Opcode.TEXT, [b"next"], [])])
    assert heard(raw, cuts, 30)[0] == [body if size <= 30 else body[:15] + body[-15:], b"next"]


@pytest.mark.parametrize(
    "odd",
    [
        Frame(Opcode.TEXT, b"masked").serialize(mask=True),
        b"\xc1\x08deflated",
        b"\x81\x7f\xff\xff\xff\xff\xff\xff\xff\xff",
    ],
    ids=["masked", "compressed", "length of 64 bits"],
)
def test_it_goes_deaf_on_what_a_server_may_not_send(odd: bytes) -> None:
    found, listener = heard(frame(Opcode.TEXT, b"before") + odd + frame(Opcode.TEXT, b"after"), [])
    assert found == [b"before"]
    assert listener.deaf


@given(st.binary(max_size=300), CUTS)
def test_anything_can_be_fed(raw: bytes, cuts: list[int]) -> None:
    whole, _ = heard(raw, [])
    assert heard(raw, cuts)[0] == whole
