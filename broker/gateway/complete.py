"""Whether an answer of status 200 is whole and no failure, by what it says itself. Pure.

A stream that breaks, or fails half-way, can still end cleanly as HTTP has it. So a stream counts only when it
ends as its provider's streams end, and no event in it is an error.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from typing import Any

import msgspec

from broker.gateway.cache import Recorded

MAX_INFLATED = 16 * 2**20
LAST_LINES = 48
_SUSPECT = re.compile(rb"error|response\.(?:failed|incomplete)")
_ENDS = frozenset(("message_stop", "response.completed"))
_FAILURES = frozenset(("error", "response.failed", "response.incomplete"))
_UNFINISHED = frozenset(("failed", "incomplete", "in_progress", "queued", "cancelled"))


def complete(answer: Recorded) -> bool:
    """False also for what cannot be read."""
    text = _plain(answer)
    if text is None:
        return False
    kind = _header(answer, b"content-type").partition(b";")[0].strip().lower()
    try:
        if kind == b"text/event-stream":
            return _stream_complete(_events(_telling(text)))
        if kind == b"application/x-ndjson":
            return _stream_complete(line for line in _telling(text) if line.strip())
        value = msgspec.json.decode(text)
        return _list_complete(value) if isinstance(value, list) else isinstance(value, dict) and not _failed(value)
    except (ValueError, RecursionError):
        return False


def _header(answer: Recorded, name: bytes) -> bytes:
    return next((value for key, value in answer.headers if key.lower() == name), b"")


def _plain(answer: Recorded) -> bytes | None:
    body = b"".join(answer.pieces)
    coding = _header(answer, b"content-encoding").strip().lower()
    if coding in (b"", b"identity"):
        return body
    if coding not in (b"gzip", b"x-gzip", b"deflate"):
        return None
    inflater = zlib.decompressobj(zlib.MAX_WBITS | 32)
    try:
        text = inflater.decompress(body, MAX_INFLATED)
    except zlib.error:
        return None
    return text if inflater.eof else None


def _telling(text: bytes) -> list[bytes]:
    """The lines to look at: the last ones, and all where anything could be a failure."""
    if _SUSPECT.search(text) is None:
        lines = text.rsplit(b"\n", LAST_LINES)
        return [line.rstrip(b"\r") for line in (lines[1:] if len(lines) > LAST_LINES else lines)]
    return text.splitlines()


def _events(lines: list[bytes]) -> Iterator[bytes]:
    """The data of each event; data over several lines is one of a kind that no provider sends."""
    for line in lines:
        if line.startswith(b"data:"):
            yield line[5:].strip()
        elif line.startswith(b"event:") and line[6:].strip() == b"error":
            raise ValueError("an error event")


def _stream_complete(events: Iterator[bytes]) -> bool:
    ended = False
    for event in events:
        if event == b"[DONE]":
            ended = True
            continue
        value = msgspec.json.decode(event)
        if not isinstance(value, dict) or _failed(value):
            return False
        ended = ended or _ends(value)
    return ended


def _ends(event: dict[str, Any]) -> bool:
    return event.get("type") in _ENDS or event.get("done") is True or _has_reason(event)


def _has_reason(value: dict[str, Any]) -> bool:
    """Gemini's streams have no last word but the reason why they end."""
    candidates = value.get("candidates", value.get("response", {}))
    if isinstance(candidates, dict):
        candidates = candidates.get("candidates", ())
    return isinstance(candidates, list) and any(
        isinstance(each, dict) and bool(each.get("finishReason")) for each in candidates
    )


def _list_complete(values: list[Any]) -> bool:
    """Gemini's stream without ``alt=sse``: an array of what would be events."""
    whole = all(isinstance(each, dict) and not _failed(each) for each in values)
    return whole and any(_has_reason(each) for each in values)


def _failed(value: dict[str, Any]) -> bool:
    if value.get("error") or value.get("type") in _FAILURES:
        return True
    return value.get("object") == "response" and value.get("status") in _UNFINISHED
