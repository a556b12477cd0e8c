"""Answers that an operator has written down: a file of JSON lines, each ``{"target", "body", "response"}``.

``target`` is the path behind the provider's name, ``body`` the request's (none: a GET), ``response`` the answer's:
JSON, or a string where it is a stream. They are given to whoever asks so, with whatever credential and headers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from broker.gateway.cache import Recorded, asked, digest
from broker.gateway.caller import endpoint_of
from broker.gateway.complete import complete
from broker.gateway.policy import CacheRule

MAX_FILE_BYTES = 256 * 2**20
_EVENT = re.compile(rb".*?\n(?:\n+|\Z)|.+\Z", re.DOTALL)


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    target: str
    response: Any
    body: msgspec.Raw = msgspec.Raw(b"")


@dataclass(slots=True)
class Loaded:
    """``answers`` by key; ``bad``: what was wrong with which line."""

    answers: dict[bytes, Recorded] = field(default_factory=dict)
    bad: list[str] = field(default_factory=list)


def warm_key(provider: str, question: bytes) -> bytes:
    """The key of a written answer; ``question`` is ``cache.asked``'s."""
    return digest(b"written", provider.encode(), question)


def load(path: Path, provider: str, rule: CacheRule, max_bytes: int) -> Loaded:
    """Reads the file; raises ``OSError``."""
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        return Loaded(bad=[f"the file is of {size} bytes; {MAX_FILE_BYTES} at most"])
    with path.open("rb") as lines:
        return parse(lines, provider, rule, max_bytes)


def parse(lines: Iterable[bytes], provider: str, rule: CacheRule, max_bytes: int) -> Loaded:
    """Bad lines are skipped. ``max_bytes``: of all answers together."""
    loaded, size = Loaded(), 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            key, answer = _read(line, provider, rule)
        except (ValueError, RecursionError) as error:
            loaded.bad.append(f"line {number}: {error}")
            continue
        if size + answer.cost > max_bytes:
            loaded.bad.append(f"line {number}: no room; gateway.cache.max_bytes bounds all of them")
            continue
        size += answer.cost
        loaded.answers[key] = answer
    return loaded


def _read(line: bytes, provider: str, rule: CacheRule) -> tuple[bytes, Recorded]:
    found = msgspec.json.decode(line, type=_Line)
    body, target = bytes(found.body), found.target.encode()
    body = b"" if body == b"null" else body
    method = b"POST" if body else b"GET"
    question = asked(rule, endpoint_of(method, target), method, target, body)
    if question is None:
        raise ValueError(
            "such a request is never answered from the cache: target and model of a provider, temperature 0, no tools"
        )
    answer = _answer(found.response, target)
    if not complete(answer):
        raise ValueError("the response is not a whole answer")
    return warm_key(provider, question), answer


def _answer(response: Any, target: bytes) -> Recorded:
    if isinstance(response, str):
        text = response.encode()
        kind = b"application/x-ndjson" if text.startswith(b"{") else b"text/event-stream"
        pieces = text.splitlines(keepends=True) if text.startswith(b"{") else _EVENT.findall(text)
        return Recorded(200, b"OK", [(b"content-type", kind)], pieces, True)
    text = msgspec.json.encode(response)
    return Recorded(200, b"OK", [(b"content-type", b"application/json")], [text], False, len(text))
