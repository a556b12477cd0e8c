"""What is shown to people: nothing in it that a terminal obeys."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.cli.output import facts, shown, table


@given(st.text())
def test_nothing_that_a_terminal_obeys_is_shown(text: str) -> None:
    assert shown(text).isprintable()
    for line in (*table(("a", "b"), [(text, 1)]).splitlines(), *facts({"a": text, "b": [text]}).splitlines()):
        assert line.isprintable()
    assert len(table(("a",), [(text,)]).split("\n")) == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gpt-5.5", "gpt-5.5"),
        ("größe 漢", "größe 漢"),
        ("a\x1b[2Jb", "a\\x1b[2Jb"),
        ("a\nb", "a\\nb"),
        ("\u202eb", "\\u202eb"),
    ],
)
def test_names_stay_readable(text: str, said: str) -> None:
    assert shown(text) == said
