"""What an Ollama server says it has loaded, and whether that will do until the next look."""

from __future__ import annotations

import datetime
import json

import pytest

from broker.gateway.fetch import Fetched
from broker.gateway.preload import CHECK_S, _full_name, _kept


def said(body: object) -> Fetched:
    return Fetched(200, [], body if isinstance(body, bytes) else json.dumps(body).encode())


def loaded(seconds: float) -> set[str]:
    until = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)
    return _kept(said({"models": [{"name": "m:1b", "expires_at": until.isoformat()}]}))


def test_what_goes_before_the_next_look_is_not_kept() -> None:
    assert loaded(3 * CHECK_S) == {"m:1b"}
    assert loaded(1.5 * CHECK_S) == set()
    assert loaded(-1) == set()


@pytest.mark.parametrize("until", ["", "soon", "2318-01-01T00:00:00.123456789Z", "2318-01-01T00:00:00"])
def test_odd_times_last(until: str) -> None:
    assert _kept(said({"models": [{"model": "m", "expires_at": until}]})) == {"m:latest"}


@pytest.mark.parametrize("body", [b"", b"[]", b"not found", {"models": 3}, {"models": [{"name": 1}]}, {}])
def test_odd_answers_have_nothing_loaded(body: object) -> None:
    assert _kept(said(body)) == set()


@pytest.mark.parametrize(
    ("given", "full"),
    [("a", "a:latest"), ("a:1b", "a:1b"), ("host:5000/a/b", "host:5000/a/b:latest"), ("h/a:x", "h/a:x")],
)
def test_names(given: str, full: str) -> None:
    assert _full_name(given) == full
