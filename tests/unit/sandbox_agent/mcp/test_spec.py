from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_agent import mcp_spec
from sandbox_agent.mcp_spec import ServerSpec

GOOD: dict[str, Any] = {"name": "n", "command": "c", "args": ["a"], "env": [{"name": "X", "value": "1"}]}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
)


def test_an_entry_of_acp_is_taken() -> None:
    assert mcp_spec.parse(GOOD) == ServerSpec("n", "c", ("a",), (("X", "1"),))
    assert mcp_spec.parse({"name": "n", "command": "c"}) == ServerSpec("n", "c")
    assert mcp_spec.parse({**GOOD, "type": "stdio"}) == mcp_spec.parse(GOOD)


@pytest.mark.parametrize(
    "wrong",
    [
        {"type": "http"},
        {"name": ""},
        {"name": None},
        {"command": ""},
        {"command": "a\0b"},
        {"args": "a"},
        {"args": [1]},
        {"args": ["\udcff"]},
        {"env": {"X": "1"}},
        {"env": [["X", "1"]]},
        {"env": [{"name": "X"}]},
        {"env": [{"name": "", "value": "1"}]},
        {"env": [{"name": "A=B", "value": "1"}]},
        {"env": [{"name": "X", "value": 1}]},
    ],
)
def test_what_cannot_be_started_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="it"):
        mcp_spec.parse({**GOOD, **wrong})


@given(st.dictionaries(st.sampled_from(["name", "command", "args", "env", "type"]), JSON) | JSON)
def test_nothing_but_a_refusal_comes_of_nonsense(value: Any) -> None:
    try:
        mcp_spec.parse(value)
    except ValueError:
        return
