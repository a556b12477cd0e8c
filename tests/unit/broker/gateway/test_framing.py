"""Bodies: taken apart the same however they are cut, and refused when their framing is off."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import CortexError
from broker.gateway.framing import (
    LAST_CHUNK,
    Body,
    ChunkedBody,
    LengthBody,
    chunk,
    request_body,
    response_body,
)


def feed_all(body: Body, raw: bytes, cuts: list[int]) -> tuple[bytes, int]:
    """The body's bytes and how many bytes of ``raw`` it used, fed in pieces cut at ``cuts``."""
    edges = sorted({cut % (len(raw) + 1) for cut in cuts} | {0, len(raw)})
    got, used = b"", 0
    for start, end in pairwise(edges):
        if body.done:
            break
        pieces, taken = body.feed(raw[start:end])
        got += b"".join(pieces)
        used += taken
        assert taken == end - start or body.done
    return got, used


@given(st.lists(st.binary(min_size=1, max_size=50)), st.binary(max_size=30), st.lists(st.integers(0, 10_000)))
def test_chunks_come_back_whatever_the_cuts(chunks: list[bytes], behind: bytes, cuts: list[int]) -> None:
    raw = b"".join(part for each in chunks for part in chunk([each])) + LAST_CHUNK
    body = ChunkedBody()
    assert feed_all(body, raw + behind, cuts) == (b"".join(chunks), len(raw))
    assert body.done


@given(st.binary(max_size=100), st.integers(0, 100), st.lists(st.integers(0, 200)))
def test_a_length_takes_so_many_bytes(raw: bytes, length: int, cuts: list[int]) -> None:
    body = LengthBody(length)
    got, used = feed_all(body, raw, cuts)
    assert got == raw[:length]
    assert used == len(got)
    assert body.done == (len(raw) >= length)


def test_extensions_and_trailers_are_dropped() -> None:
    body = ChunkedBody()
    raw = b"5;a=b;c\r\nhello\r\n0;x\r\nTrailer: y\r\nOther: z\r\n\r\nnext"
    assert body.feed(raw) == ([b"hello"], len(raw) - 4)
    assert body.done


@pytest.mark.parametrize(
    "raw",
    [
        b"5\nhello\r\n0\r\n\r\n",
        b"5 \r\nhello\r\n",
        b" 5\r\nhello\r\n",
        b"0x5\r\nhello\r\n",
        b"-5\r\nhello\r\n",
        b"+5\r\nhello\r\n",
        b"5_0\r\nhello\r\n",
        b"\r\n",
        b";a\r\n",
        b"5\r\nhelloX\r\n",
        b"5\r\nhello\n0\r\n\r\n",
        b"1" * 16 + b"\r\n",
        b"5;a\rb\r\nhello\r\n",
        b"5;" + b"a" * 5000,
        b"0\r\n" + b"A: b\r\n" * 5000,
        b"0\r\nA: b\n\r\n",
    ],
)
def test_bad_chunking_is_refused(raw: bytes) -> None:
    with pytest.raises(CortexError):
        ChunkedBody().feed(raw)


@given(st.binary(max_size=100), st.lists(st.integers(0, 100)))
def test_any_bytes_are_chunks_or_refused_and_never_depend_on_the_cuts(raw: bytes, cuts: list[int]) -> None:
    def outcome(where: list[int]) -> tuple[bytes, int] | None:
        try:
            return feed_all(ChunkedBody(), raw, where)
        except CortexError:
            return None

    assert outcome(cuts) == outcome([])


def test_no_piece_never_makes_the_last_chunk() -> None:
    assert chunk([]) == []
    assert chunk([b""]) == []


def test_which_body_follows() -> None:
    assert request_body(None, False) is None
    assert request_body(0, False) is None
    assert isinstance(request_body(3, False), LengthBody)
    assert isinstance(request_body(None, True), ChunkedBody)
    assert response_body(200, b"HEAD", 10, False).done
    assert response_body(204, b"GET", None, False).done
    assert response_body(304, b"GET", 10, True).done
    assert response_body(200, b"GET", None, False).ends_at_close
    assert not response_body(200, b"GET", 5, False).ends_at_close
