"""The journal's format, by properties."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from sandbox_agent import records

BODY = st.one_of(
    st.dictionaries(st.text(max_size=5), st.text(max_size=30), max_size=3).map(
        lambda value: json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
    ),
    st.just(b'{"a":"CJCJCJ"}'),
)
NUMBER = st.integers(0, 2**32 - 1)
FIELDS = st.tuples(st.integers(1, 12), st.integers(0, 1), st.integers(0, 2**63), NUMBER, NUMBER, BODY)


def written(fields: list[tuple[int, int, int, int, int, bytes]]) -> tuple[bytes, list[records.Record]]:
    data, made = b"", []
    for kind, flags, seq, conversation, target, body in fields:
        at = len(data)
        data += records.header(kind, flags, seq, conversation, target, body) + body
        made.append(records.Record(kind, flags, seq, conversation, target, body, at, len(data)))
    return data, made


@given(st.lists(FIELDS, max_size=8))
def test_what_is_written_is_read(fields: list[tuple[int, int, int, int, int, bytes]]) -> None:
    data, made = written(fields)
    assert list(records.read_all(data)) == made


@given(st.lists(FIELDS, min_size=1, max_size=6), st.data())
def test_a_torn_file_gives_the_whole_records_before_the_tear(
    fields: list[tuple[int, int, int, int, int, bytes]], draw: st.DataObject
) -> None:
    data, made = written(fields)
    cut = draw.draw(st.integers(0, len(data)))
    assert list(records.read_all(data[:cut])) == [record for record in made if record.end <= cut]


@given(st.lists(FIELDS, min_size=1, max_size=6), st.data())
def test_a_damaged_byte_costs_the_record_that_it_is_in_and_no_other(
    fields: list[tuple[int, int, int, int, int, bytes]], draw: st.DataObject
) -> None:
    data, made = written(fields)
    at = draw.draw(st.integers(0, len(data) - 1))
    damaged = bytearray(data)
    damaged[at] ^= draw.draw(st.integers(1, 255))
    assert list(records.read_all(bytes(damaged))) == [r for r in made if not r.at <= at < r.end]


def test_needed_is_the_size_of_the_record() -> None:
    data, made = written([(3, 0, 7, 1, 0, b"{}" * 50)])
    assert records.needed(data[: records.HEADER], 0) == len(data)
    assert records.needed(data[: records.HEADER - 1], 0) == 0
    assert records.needed(b"x" * 40, 0) == 0
    assert made[0].moved(100)[-2:] == (100, 100 + len(data))
