from __future__ import annotations

from typing import Any

import pytest

from sandbox_agent import mcp_lists
from sandbox_agent.jsonrpc import Message
from sandbox_agent.mcp_peer import Peer


class Script(Peer):
    """Answers each request with what ``answer`` makes of its params."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer
        self.asked = 0

    def send(self, message: Message) -> None:
        self.asked += 1
        self.answered({"id": message["id"], **self.answer(message["params"])})


def page(*names: Any, then: Any = None) -> dict[str, Any]:
    more = {} if then is None else {"nextCursor": then}
    return {"result": {"tools": [{"name": name} for name in names], **more}}


async def names(answer: Any) -> list[str]:
    return [item["name"] for item in await mcp_lists.fetch(Script(answer), "tools")]


async def test_pages_are_read_to_the_end() -> None:
    pages = {None: page("a", then="x"), "x": page(then="y"), "y": page("b", "c")}
    assert await names(lambda params: pages[params.get("cursor")]) == ["a", "b", "c"]


async def test_a_list_without_end_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    def more(params: Any) -> Any:
        return page("a", then=str(int(params.get("cursor", 0)) + 1))

    monkeypatch.setattr(mcp_lists, "MAX_PAGES", 7)
    assert len(await names(more)) == 7
    monkeypatch.setattr(mcp_lists, "MAX_ITEMS", 3)
    assert len(await names(more)) == 3
    assert len(await names(lambda _: page(*"abcdefg"))) == 3


async def test_a_cursor_that_leads_back_is_followed_once() -> None:
    script = Script(lambda _: page("a", then="same"))
    assert len(await mcp_lists.fetch(script, "tools")) == 2
    assert script.asked == 2


@pytest.mark.parametrize(
    "answer",
    [
        {"error": {"code": -32601, "message": "no"}},
        {"result": None},
        {"result": []},
        {"result": {}},
        {"result": {"tools": {}}},
        {"result": {"tools": [1, "a", {}, {"name": 1}, None]}},
    ],
)
async def test_what_is_no_list_has_no_items(answer: Any) -> None:
    assert await names(lambda _: answer) == []


@pytest.mark.parametrize("answer", [None, [], {}, {"protocolVersion": "3"}, {"protocolVersion": ["2025-06-18"]}])
def test_a_greeting_of_another_kind_is_refused(answer: Any) -> None:
    with pytest.raises(ValueError, match="it"):
        mcp_lists.greeting(answer)


def test_what_a_greeting_lacks_is_empty() -> None:
    listing = mcp_lists.greeting({"protocolVersion": "2024-11-05", "capabilities": [], "instructions": 5})
    assert (listing.capabilities, listing.instructions, listing.lists) == ({}, "", {})
