"""Reads activity out of logs: CSV, or one JSON object a line, with a time, a user and maybe a kind. Pure.

Times are ISO 8601 (UTC where they name no zone) or seconds or milliseconds since the epoch. CSV needs no
header when its columns are time, user, kind.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from broker.config import USER_ID
from broker.errors import Code, CortexError
from broker.session.activity import KINDS, MINUTE
from broker.store.activity import Tally

TIME_NAMES = ("timestamp", "time", "ts", "at", "date", "datetime", "created_at")
USER_NAMES = ("user", "user_id", "userid", "username")
KIND_NAMES = ("kind",)
DEFAULT_KIND = "request"
MAX_LINE = 65_536
_MILLISECONDS = 1e11
"""Larger numbers are milliseconds: as seconds they would lie beyond the year 5000."""
_LATEST = 253_402_300_799.0
"""The end of the year 9999."""

Columns = tuple[int, int, int | None]


@dataclass(frozen=True)
class Entry:
    """One line. ``at``: seconds since the epoch."""

    at: float
    user: str
    kind: str


def entries(lines: Iterable[str]) -> Iterator[Entry]:
    """The entries of a log, in its order. Raises ``BAD_REQUEST`` that names the line."""
    read: Callable[[str], Entry | None] | None = None
    for number, raw in enumerate(lines, 1):
        line = raw.strip().removeprefix("\ufeff")
        if not line:
            continue
        try:
            if len(line) > MAX_LINE:
                raise ValueError(f"the line is longer than {MAX_LINE} characters")
            read = read or (_json if line.startswith("{") else _Csv())
            entry = read(line)
        except (ValueError, csv.Error, RecursionError) as error:
            raise CortexError(
                Code.BAD_REQUEST,
                f"line {number} is no activity",
                cause=str(error),
                hint='write "time,user[,kind]" or {"timestamp": …, "user": …}; nothing was imported',
            ) from error
        if entry is not None:
            yield entry


def tallies(found: Iterable[Entry]) -> list[Tally]:
    """Entries added up by user, minute and kind, in order of time."""
    counted: dict[tuple[str, int, str], list[int]] = {}
    for entry in found:
        minute, second = divmod(int(entry.at), MINUTE)
        known = counted.setdefault((entry.user, minute, entry.kind), [0, second, second])
        known[0] += 1
        known[1], known[2] = min(known[1], second), max(known[2], second)
    return sorted(
        Tally(minute, first, kind, user, count, last) for (user, minute, kind), (count, first, last) in counted.items()
    )


def uses(found: Iterable[Tally]) -> dict[str, list[int]]:
    """Minutes with a use by user, ascending: what a replay takes."""
    minutes: dict[str, set[int]] = {}
    for tally in found:
        if tally.kind != "intent":
            minutes.setdefault(tally.user, set()).add(tally.minute)
    return {user: sorted(those) for user, those in minutes.items()}


def when(value: object) -> float:
    """Seconds since the epoch. Raises ``ValueError``."""
    if isinstance(value, str):
        text = value.strip()
        try:
            value = float(text)
        except ValueError:
            return _plausible(_iso(text), text)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{str(value)[:40]!r} is no time")
    return _plausible(value / 1000 if abs(value) > _MILLISECONDS else float(value), value)


def _iso(text: str) -> float:
    try:
        at = datetime.fromisoformat(text)
        return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{text[:40]!r} is no time") from error


def _plausible(at: float, told: object) -> float:
    if not math.isfinite(at) or not 0 <= at <= _LATEST:
        raise ValueError(f"{str(told)[:40]!r} is no time")
    return at


def _entry(time: object, user: object, kind: object) -> Entry:
    named = str(user) if isinstance(user, int) and not isinstance(user, bool) else user
    if not isinstance(named, str) or not USER_ID.fullmatch(named := named.strip()):
        raise ValueError(f"{str(user)[:40]!r} is no user id")
    kind = DEFAULT_KIND if kind in (None, "") else kind
    if kind not in KINDS:
        raise ValueError(f"{str(kind)[:40]!r} is no kind; there are {', '.join(KINDS)}")
    return Entry(when(time), named, str(kind))


def _json(line: str) -> Entry:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")
    fields: Mapping[str, Any] = {str(name).lower(): item for name, item in value.items()}
    return _entry(_pick(fields, TIME_NAMES, "time"), _pick(fields, USER_NAMES, "user"), _first(fields, KIND_NAMES))


def _pick(fields: Mapping[str, Any], names: tuple[str, ...], what: str) -> Any:
    if not any(name in fields for name in names):
        raise ValueError(f"it has no {what}; names for it are {', '.join(names)}")
    return _first(fields, names)


def _first(fields: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((fields[name] for name in names if name in fields), None)


class _Csv:
    """One row after the other; the first may be a header."""

    def __init__(self) -> None:
        self._columns: Columns | None = None

    def __call__(self, line: str) -> Entry | None:
        cells = next(csv.reader([line], strict=True))
        if self._columns is None:
            self._columns, header = _columns(cells)
            if header:
                return None
        time, user, kind = self._columns
        if max(time, user) >= len(cells):
            raise ValueError(f"it has {len(cells)} columns")
        return _entry(cells[time], cells[user], cells[kind] if kind is not None and kind < len(cells) else None)


def _columns(cells: list[str]) -> tuple[Columns, bool]:
    """Where time, user and kind are, and whether this row is the header that says so."""
    names = {cell.strip().lower(): place for place, cell in enumerate(cells)}
    time, user = _first(names, TIME_NAMES), _first(names, USER_NAMES)
    if time is not None and user is not None:
        return (time, user, _first(names, KIND_NAMES)), True
    try:
        when(cells[0])
    except ValueError as error:
        raise ValueError(
            f"it is neither a header with a time ({', '.join(TIME_NAMES)}) and a user ({', '.join(USER_NAMES)}) "
            "nor a row that begins with a time"
        ) from error
    return (0, 1, 2), False
