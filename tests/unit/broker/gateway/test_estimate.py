"""About how much a model has written, told from what passed."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.gateway.estimate import AT_ONCE, Text, tokens_in
from broker.gateway.policy import Kind

WORDS = st.lists(st.text(st.characters(codec="ascii"), max_size=30), max_size=20)


def spelled(text: str) -> int:
    """Bytes of a text in JSON."""
    return len(json.dumps(text)) - 2


def size(shape: Kind, *pieces: bytes) -> int:
    text = Text(shape)
    for piece in pieces:
        text.add(piece)
    return text.size


EVENTS: dict[str, tuple[Kind, Callable[[str], object]]] = {
    "chat": ("openai", lambda word: {"choices": [{"delta": {"content": word}}], "obfuscation": "xxxx"}),
    "a function of chat": ("openai", lambda word: {"choices": [{"delta": {"tool_calls": [{"arguments": word}]}}]}),
    "responses": ("openai", lambda word: {"type": "response.output_text.delta", "delta": word}),
    "messages": ("anthropic", lambda word: {"delta": {"type": "text_delta", "text": word}}),
    "thoughts": ("anthropic", lambda word: {"delta": {"type": "thinking_delta", "thinking": word}}),
    "tool use": ("anthropic", lambda word: {"delta": {"type": "input_json_delta", "partial_json": word}}),
    "gemini": ("gemini", lambda word: {"candidates": [{"content": {"parts": [{"text": word}]}}]}),
    "ollama": ("ollama", lambda word: {"message": {"content": word}, "done": False}),
    "ollama's other way": ("ollama", lambda word: {"response": word, "done": False}),
}


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
@pytest.mark.parametrize("name", EVENTS)
@given(WORDS)
def test_it_is_what_the_model_wrote_and_not_what_is_around_it(
    name: str, separators: tuple[str, str], words: list[str]
) -> None:
    shape, event = EVENTS[name]
    pieces = [b"data: " + json.dumps(event(word), separators=separators).encode() + b"\n\n" for word in words]
    assert size(shape, *pieces) == sum(map(spelled, words))


@given(st.lists(st.integers(0, 40_000), max_size=8))
def test_how_it_is_cut_makes_no_difference(at: list[int]) -> None:
    body = b"".join(b'data: {"choices":[{"delta":{"content":"word %d"}}]}\n\n' % number for number in range(700))
    assert len(body) > 2 * AT_ONCE
    places = sorted({0, len(body), *(min(place, len(body)) for place in at)})
    whole = sum(len(b"word %d" % number) for number in range(700))
    assert size("openai", *(body[begin:end] for begin, end in pairwise(places))) == whole


def test_what_is_said_twice_counts_once() -> None:
    events = (
        {"delta": "hello"},
        {"delta": " you"},
        {"text": "hello you"},
        {"item": {"content": [{"text": "hello you"}]}},
    )
    assert size("openai", *(json.dumps(event).encode() + b"\n" for event in events)) == 9


def test_one_long_event_is_not_kept() -> None:
    text = Text("openai")
    for _ in range(100):
        text.add(b'{"delta":"' + b"x" * AT_ONCE)
        assert sum(map(len, text._pieces)) <= AT_ONCE


def test_the_first_name_is_the_models() -> None:
    text = Text("openai")
    text.add(b'{"response":{"instructions":"say \\"model\\":\\"a\\"","model" : "b\\u0061","tools":[{"model":"c"}]}}\n')
    assert text.model == b'"b\\u0061"'
    assert Text("openai").model == b""


def test_four_bytes_are_a_token() -> None:
    assert [tokens_in(size) for size in (0, 3, 4, 4000)] == [0, 0, 1, 1000]
