"""Logs are read whatever their shape, and what is wrong is named by its line."""

from __future__ import annotations

import csv
import io
import json
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import Code, CortexError
from broker.session.activity_log import Entry, entries, tallies, uses, when
from broker.store.activity import Tally

AT = 1_700_000_000.0


@pytest.mark.parametrize(
    "line",
    [
        "1700000000,ann",
        "1700000000000,ann,request",
        "2023-11-14T22:13:20Z,ann,",
        '"2023-11-14 23:13:20+01:00","ann"',
        "2023-11-14T22:13:20,ann",
        '{"timestamp": 1700000000, "user": "ann"}',
        '{"TS": "1700000000.0", "User_ID": "ann", "more": [1]}',
        '{"time": "2023-11-14T22:13:20Z", "user": "ann", "kind": "request", "event": "message"}',
    ],
)
def test_forms_of_a_line(line: str) -> None:
    assert list(entries([line + "\n"])) == [Entry(AT, "ann", "request")]


def test_a_header_says_which_column_is_which() -> None:
    log = "\ufeffchannel,Kind,username,created_at\r\nx,intent,ann,1700000000\r\n\r\ny,end,17,1700000001\r\n"
    assert list(entries(io.StringIO(log))) == [Entry(AT, "ann", "intent"), Entry(AT + 1, "17", "end")]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("yesterday,ann", "no time"),
        ("1700000000", "1 columns"),
        ("1700000000,../etc", "no user id"),
        ("1700000000,ann,drink", "no kind"),
        ("-5,ann", "no time"),
        ("nan,ann", "no time"),
        ("1e300,ann", "no time"),
        ('1700000000,"ann', "unexpected end of data"),
    ],
)
def test_what_is_wrong_is_named_by_its_line(line: str, why: str) -> None:
    with pytest.raises(CortexError) as caught:
        list(entries(["", "timestamp,user,kind", "1700000000,ann", line]))
    assert caught.value.code is Code.BAD_REQUEST
    assert "line 4" in caught.value.what
    assert why in str(caught.value.cause)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"user": "ann"}', "no time; names for it are timestamp"),
        ('{"time": 1}', "no user"),
        ('{"time": true, "user": "ann"}', "no time"),
        ('{"time": null, "user": "ann"}', "no time"),
        ('{"time": 1, "user": ["ann"]}', "no user id"),
        ('{"time": 1, "user": true}', "no user id"),
        ('{"time": 1, "user": "ann", "kind": {}}', "no kind"),
        ('{"time": 1, "user"', "no JSON"),
        ("{" * 40_000, "no JSON"),
        ('{"x": "' + "y" * 70_000, "longer than"),
    ],
)
def test_what_is_wrong_in_json(line: str, why: str) -> None:
    with pytest.raises(CortexError) as caught:
        list(entries([line]))
    assert "line 1" in caught.value.what
    assert why in str(caught.value.cause)


def test_a_line_that_is_neither_header_nor_row() -> None:
    with pytest.raises(CortexError) as caught:
        list(entries(["who,when", "ann,1"]))
    assert "neither a header" in str(caught.value.cause)


def test_entries_are_added_up_by_minute_in_order_of_time() -> None:
    found = [Entry(125.9, "bob", "request"), Entry(61, "ann", "request"), Entry(119, "ann", "request")]
    found += [Entry(62, "ann", "end"), Entry(60, "ann", "intent")]
    assert tallies(found) == [
        Tally(1, 0, "intent", "ann", 1, 0),
        Tally(1, 1, "request", "ann", 2, 59),
        Tally(1, 2, "end", "ann", 1, 2),
        Tally(2, 5, "request", "bob", 1, 5),
    ]
    assert uses(tallies(found)) == {"ann": [1], "bob": [2]}


ENTRIES = st.lists(
    st.builds(
        Entry,
        st.integers(0, 4_000_000_000).map(float),
        st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._@+:|-]{0,10}", fullmatch=True),
        st.sampled_from(["intent", "start", "request", "end"]),
    ),
    max_size=20,
)


@given(ENTRIES)
def test_what_was_written_is_what_is_read(found: list[Entry]) -> None:
    lines = [json.dumps({"at": one.at, "user": one.user, "kind": one.kind}) for one in found]
    assert list(entries(lines)) == found
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(["time", "user", "kind"])
    table.writerows([datetime.fromtimestamp(one.at, UTC).isoformat(), one.user, one.kind] for one in found)
    assert list(entries(io.StringIO(text.getvalue()))) == found
    assert sum(tally.count for tally in tallies(found)) == len(found)


@given(st.lists(st.text(max_size=40), max_size=5))
def test_whatever_is_read_either_is_activity_or_is_refused(lines: list[str]) -> None:
    try:
        found = list(entries(lines))
    except CortexError as error:
        code = error.code
    else:
        code = Code.BAD_REQUEST
        assert all(entry.at >= 0 and entry.user for entry in found)
    assert code is Code.BAD_REQUEST


@given(st.datetimes(datetime(1971, 1, 1), datetime(2200, 1, 1)), st.integers(-12, 12))
def test_a_zone_is_believed(at: datetime, hours: int) -> None:
    zoned = at.replace(tzinfo=timezone(timedelta(hours=hours)))
    assert when(zoned.isoformat()) == pytest.approx(zoned.timestamp())
