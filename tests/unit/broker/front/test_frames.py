"""The scanner against a plain reference and against the websockets library, however the bytes are cut."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.client import ClientProtocol
from websockets.exceptions import PayloadTooBig, ProtocolError
from websockets.frames import Frame
from websockets.protocol import OPEN, Protocol
from websockets.server import ServerProtocol
from websockets.uri import parse_uri

from broker.errors import Code, CortexError
from broker.front.frames import (
    BINARY,
    CLOSE,
    CONTINUATION,
    PING,
    PONG,
    TEXT,
    Control,
    FrameScanner,
    close_payload,
    frame,
    parse_close,
)

LIMIT = 100_000
KEY = b"\x01\x82\x03\xf4"


def encode(
    opcode: int, payload: bytes, *, masked: bool = True, fin: bool = True, rsv: int = 0, size: int | None = None
) -> bytes:
    """Any frame, wrong ones too. ``size``: 7, 16 or 64 bits for the length; None: the fewest."""
    length = len(payload)
    if size is None:
        size = 7 if length < 126 else 16 if length <= 0xFFFF else 64
    first, flag = (0x80 if fin else 0) | rsv << 4 | opcode, 0x80 if masked else 0
    if size == 7:
        head = bytes((first, flag | length))
    elif size == 16:
        head = struct.pack("!BBH", first, flag | 126, length)
    else:
        head = struct.pack("!BBQ", first, flag | 127, length)
    if not masked:
        return head + payload
    return head + KEY + bytes(byte ^ KEY[index % 4] for index, byte in enumerate(payload))


@dataclass
class Seen:
    forwarded: bytes = b""
    controls: list[Control] = field(default_factory=list)
    error: Code | None = None


def cut(scanner: FrameScanner, chunks: Iterable[bytes], *, single: bool = False) -> Seen:
    """What the scanner makes of a stream. ``single``: one frame at a time."""
    seen = Seen()
    for chunk in chunks:
        pos = 0
        while pos < len(chunk):
            end = scanner.scan_frame(chunk, pos) if single else scanner.scan(chunk, pos)
            if end > pos:
                seen.forwarded += chunk[pos:end]
                pos = end
                continue
            try:
                pos, found = scanner.step(chunk, pos)
            except CortexError as error:
                seen.error = error.code
                return seen
            if isinstance(found, Control):
                seen.controls.append(found)
            elif found:
                seen.forwarded += found
    return seen


def reference(stream: bytes, *, masked: bool, limit: int) -> Seen:
    """The same by RFC 6455, read from the start, one frame after another, with no state but a message's size."""
    seen, pos, message, fragmented = Seen(), 0, 0, False
    while len(stream) - pos >= 2:
        first, second = stream[pos], stream[pos + 1]
        opcode, fin, length, head = first & 15, first >> 7, second & 127, 2
        control = opcode >= 8
        bad = first & 0x70 or second >> 7 != masked or opcode in range(3, 8) or opcode > 10
        bad = bad or (control and (not fin or length > 125))
        bad = bad or (not control and (opcode == 0) != fragmented)
        if bad:
            seen.error = Code.FRAME_INVALID
            break
        if length >= 126:
            head = 4 if length == 126 else 10
            if len(stream) - pos < head:
                break
            least = 126 if length == 126 else 0x10000
            length = int.from_bytes(stream[pos + 2 : pos + head], "big")
            if length < least or length >= 2**63:
                seen.error = Code.FRAME_INVALID
                break
        end = pos + head + length + (4 if masked else 0)
        if control:
            if len(stream) < end:
                break
            body = stream[end - length : end]
            key = stream[pos + 2 : pos + 6] if masked else b"\0\0\0\0"
            seen.controls.append(Control(opcode, bytes(b ^ key[i % 4] for i, b in enumerate(body))))
        else:
            message = length + (message if opcode == 0 else 0)
            if message > limit:
                seen.error = Code.FRAME_TOO_BIG
                break
            fragmented = not fin
            seen.forwarded += stream[pos:end]
        pos = end
    return seen


def chunked(stream: bytes, cuts: Sequence[int]) -> list[bytes]:
    edges = sorted({0, len(stream), *[cut % (len(stream) + 1) for cut in cuts]})
    return [stream[a:b] for a, b in itertools.pairwise(edges)]


payloads = st.one_of(
    st.binary(max_size=12),
    st.sampled_from([125, 126, 127, 300, 0xFFFF, 0x10000]).map(lambda size: b"z" * size),
)


@st.composite
def streams(draw: st.DrawFn, *, masked: bool, bad: bool = True) -> bytes:
    """Mostly valid frames in a valid order; with ``bad`` some that are not."""
    out, fragmented = b"", False
    for _ in range(draw(st.integers(1, 8))):
        kind = draw(st.sampled_from(["data", "data", "control", "bad"] if bad else ["data", "data", "control"]))
        if kind == "control":
            opcode = draw(st.sampled_from([PING, PONG]))
            out += encode(opcode, draw(st.binary(max_size=125)), masked=masked)
        elif kind == "data":
            fin = draw(st.booleans())
            opcode = CONTINUATION if fragmented else draw(st.sampled_from([TEXT, BINARY]))
            out += encode(opcode, draw(payloads), masked=masked, fin=fin)
            fragmented = not fin
        else:
            out += encode(
                draw(st.integers(0, 15)),
                draw(st.binary(max_size=125)),
                masked=draw(st.booleans()),
                fin=draw(st.booleans()),
                rsv=draw(st.integers(0, 7)),
                size=draw(st.sampled_from([7, 16, 64])),
            )
    return out


@given(data=st.data(), masked=st.booleans(), limit=st.sampled_from([5, 200, 70_000, LIMIT]), single=st.booleans())
@settings(max_examples=300, deadline=None)
def test_agrees_with_the_reference_however_it_is_cut(
    data: st.DataObject, masked: bool, limit: int, single: bool
) -> None:
    stream = data.draw(streams(masked=masked))
    cuts = data.draw(st.lists(st.integers(0, 400_000), max_size=12))
    seen = cut(FrameScanner(masked=masked, limit=limit), chunked(stream, cuts), single=single)
    assert seen == reference(stream, masked=masked, limit=limit)


@given(stream=st.binary(max_size=60), masked=st.booleans(), cuts=st.lists(st.integers(0, 60), max_size=6))
@settings(max_examples=300, deadline=None)
def test_agrees_with_the_reference_on_any_bytes(stream: bytes, masked: bool, cuts: list[int]) -> None:
    seen = cut(FrameScanner(masked=masked, limit=LIMIT), chunked(stream, cuts))
    assert seen == reference(stream, masked=masked, limit=LIMIT)


EVERY_KIND = [
    encode(TEXT, b"hello"),
    encode(PING, b"are you there"),
    encode(TEXT, b"x" * 200),
    encode(BINARY, b"begin", fin=False),
    encode(PONG, b""),
    encode(CONTINUATION, b"", fin=False),
    encode(CONTINUATION, b"end"),
    encode(TEXT, b""),
    encode(CLOSE, close_payload(1000, "bye")),
]


@pytest.mark.parametrize("masked", [True, False])
def test_every_split_in_three_gives_the_same(masked: bool) -> None:
    stream = b"".join(EVERY_KIND)
    if not masked:
        stream = b"".join(
            encode(part[0] & 15, _unmask(part), masked=False, fin=bool(part[0] & 0x80)) for part in EVERY_KIND
        )
    whole = reference(stream, masked=masked, limit=LIMIT)
    assert whole.error is None
    assert [control.opcode for control in whole.controls] == [PING, PONG, CLOSE]
    for first in range(0, len(stream), 1):
        for second in range(first, len(stream), 7):
            chunks = [stream[:first], stream[first:second], stream[second:]]
            assert cut(FrameScanner(masked=masked, limit=LIMIT), chunks) == whole
    one_by_one = [stream[index : index + 1] for index in range(len(stream))]
    assert cut(FrameScanner(masked=masked, limit=LIMIT), one_by_one) == whole


def _unmask(part: bytes) -> bytes:
    short = part[1] & 0x7F
    body = part[6:] if short < 126 else part[8:]
    return bytes(byte ^ KEY[index % 4] for index, byte in enumerate(body))


def _library(masked: bool) -> Protocol:
    if masked:
        return ServerProtocol(state=OPEN, max_size=LIMIT)
    return ClientProtocol(parse_uri("ws://peer/"), state=OPEN, max_size=LIMIT)


def _parsed(masked: bool, stream: bytes) -> tuple[list[Frame], BaseException | None]:
    protocol = _library(masked)
    protocol.receive_data(stream)
    return [event for event in protocol.events_received() if isinstance(event, Frame)], protocol.parser_exc


@given(data=st.data(), masked=st.booleans())
@settings(max_examples=150, deadline=None)
def test_what_is_forwarded_reads_the_same_in_the_websockets_library(data: st.DataObject, masked: bool) -> None:
    stream = data.draw(streams(masked=masked, bad=False))
    seen = cut(FrameScanner(masked=masked, limit=LIMIT), chunked(stream, data.draw(st.lists(st.integers(0, 400_000)))))
    frames, error = _parsed(masked, stream)
    if isinstance(error, PayloadTooBig):
        assert seen.error is Code.FRAME_TOO_BIG
        return
    assert error is None
    assert seen.error is None
    assert _parsed(masked, seen.forwarded)[0] == [item for item in frames if item.opcode < 8]
    controls = [(item.opcode, bytes(item.data)) for item in frames if item.opcode >= 8]
    assert [(control.opcode, control.payload) for control in seen.controls] == controls


@pytest.mark.parametrize(
    ("stream", "code"),
    [
        (encode(TEXT, b"x", masked=False), Code.FRAME_INVALID),
        (encode(TEXT, b"x", rsv=4), Code.FRAME_INVALID),
        (encode(TEXT, b"x", rsv=1), Code.FRAME_INVALID),
        (encode(3, b"x"), Code.FRAME_INVALID),
        (encode(11, b"x"), Code.FRAME_INVALID),
        (encode(PING, b"x", fin=False), Code.FRAME_INVALID),
        (encode(PING, b"x" * 126), Code.FRAME_INVALID),
        (encode(CONTINUATION, b"x"), Code.FRAME_INVALID),
        (encode(TEXT, b"x", fin=False) + encode(TEXT, b"y"), Code.FRAME_INVALID),
        (encode(TEXT, b"x" * LIMIT + b"y"), Code.FRAME_TOO_BIG),
        (encode(TEXT, b"x" * LIMIT, fin=False) + encode(CONTINUATION, b"y"), Code.FRAME_TOO_BIG),
    ],
)
def test_the_library_refuses_the_same(stream: bytes, code: Code) -> None:
    assert cut(FrameScanner(masked=True, limit=LIMIT), [stream]).error is code
    _, error = _parsed(True, stream)
    assert isinstance(error, PayloadTooBig if code is Code.FRAME_TOO_BIG else ProtocolError)


@pytest.mark.parametrize("size", [16, 64])
def test_a_length_in_more_bytes_than_needed_is_refused(size: int) -> None:
    stream = encode(TEXT, b"short", size=size)
    assert cut(FrameScanner(masked=True, limit=LIMIT), [stream]).error is Code.FRAME_INVALID


def test_a_message_of_exactly_the_limit_passes() -> None:
    stream = encode(TEXT, b"x" * LIMIT) + encode(TEXT, b"y" * LIMIT)
    assert cut(FrameScanner(masked=True, limit=LIMIT), [stream]).error is None


def test_what_goes_before_a_violation_is_still_forwarded() -> None:
    good = encode(TEXT, b"one") + encode(TEXT, b"two")
    seen = cut(FrameScanner(masked=True, limit=LIMIT), [good + encode(TEXT, b"bad", rsv=2)])
    assert (seen.forwarded, seen.error) == (good, Code.FRAME_INVALID)


def test_boundaries_are_known_in_the_middle_of_a_frame_and_of_a_message() -> None:
    scanner = FrameScanner(masked=False, limit=LIMIT)
    assert not scanner.in_message
    scanner.scan(encode(TEXT, b"12345", masked=False)[:4])
    assert (scanner.remaining, scanner.in_message) == (3, True)
    scanner.scan(b"345")
    assert (scanner.remaining, scanner.in_message) == (0, False)
    scanner.scan(encode(TEXT, b"12345", masked=False, fin=False))
    assert (scanner.remaining, scanner.in_message) == (0, True)


def test_frames_are_counted_once_each() -> None:
    scanner = FrameScanner(masked=True, limit=LIMIT)
    stream = encode(TEXT, b"a") * 3 + encode(PING, b"") + encode(BINARY, b"b" * 70_000) + encode(TEXT, b"c" * 300)
    cut(scanner, [stream[:5], stream[5:40], stream[40:]])
    assert scanner.frames == 5


@given(opcode=st.sampled_from([TEXT, BINARY]), payload=payloads)
def test_own_frames_are_valid(opcode: int, payload: bytes) -> None:
    frames, error = _parsed(False, frame(opcode, payload))
    assert error is None
    assert [(item.opcode, bytes(item.data)) for item in frames] == [(opcode, payload)]


def test_close_payloads_round_trip_and_reasons_are_cut_at_a_character() -> None:
    assert parse_close(close_payload(4401, "gone")) == (4401, "gone")
    assert parse_close(b"") == (1005, "")
    long = close_payload(1000, "ä" * 100)
    assert len(long) <= 125
    assert parse_close(long) == (1000, "ä" * 61)


@pytest.mark.parametrize("payload", [b"\x03", struct.pack("!H", 1005), struct.pack("!H", 999), b"\x03\xe8\xff"])
def test_a_bad_close_payload_is_refused(payload: bytes) -> None:
    with pytest.raises(CortexError) as caught:
        parse_close(payload)
    assert caught.value.code is Code.FRAME_INVALID
