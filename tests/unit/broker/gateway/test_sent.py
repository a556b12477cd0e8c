"""What a call keeps to be made again: its body, framed as it came, and where it was."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from broker.gateway.framing import ChunkedBody
from broker.gateway.sent import MAX_REPLAY, RequestBody

PIECES = st.lists(st.binary(min_size=1, max_size=20), max_size=8)


@given(PIECES, PIECES, st.booleans())
def test_a_server_that_begins_to_get_a_body_gets_all_of_it(
    before: list[bytes], after: list[bytes], chunked: bool
) -> None:
    body = RequestBody(chunked=chunked, done=False)
    for piece in before:
        body.take([piece], False)
    sent = list(body.so_far())
    for number, piece in enumerate(after):
        body.take([piece], number == len(after) - 1)
        sent += body.framed([piece])
    if not after:
        body.take([], True)
        sent += body.framed([])
    again = body.so_far()
    whole = b"".join(before + after)
    for framed in (b"".join(sent), b"".join(again)):
        if chunked:
            reader = ChunkedBody()
            pieces, used = reader.feed(framed)
            assert (b"".join(pieces), used, reader.done) == (whole, len(framed), True)
        else:
            assert framed == whole
    assert (body.whole(), body.size) == (whole, len(whole))


def test_a_large_body_is_kept_until_it_is_sent_and_no_longer() -> None:
    body = RequestBody(chunked=False, done=False)
    body.take([b"x" * (MAX_REPLAY + 1)], False)
    assert body.replayable
    assert sum(map(len, body.so_far())) == MAX_REPLAY + 1
    body.take([b"y"], True)
    assert not body.replayable
    assert body.whole() == b""
