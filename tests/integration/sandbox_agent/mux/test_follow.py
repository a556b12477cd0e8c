"""Whether conversations know the tools that there are now."""

from __future__ import annotations

import pytest

from sandbox_agent import mux as mux_module
from tests.integration.sandbox_agent.mux.kit import Place, server
from tests.integration.sandbox_agent.mux.test_cache import seen_once

TOLD = "notifications/tools/list_changed"


async def test_a_conversation_that_has_listed_is_behind_until_it_has_listed_again(place: Place) -> None:
    agent = await place.agent()
    assert await agent.names() == []
    assert place.mux.followed
    place.mux.set([server("one")])
    assert not (place.mux.settled and place.mux.followed)
    await agent.noted(TOLD)
    assert place.mux.settled
    assert not place.mux.followed
    before = place.changes
    assert "one__echo" in await agent.names()
    assert place.mux.followed
    assert place.changes > before


async def test_one_that_never_lists_again_is_not_waited_for_long(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mux_module, "FOLLOW_S", 0.05)
    deaf, other = await place.agent(), await place.agent()
    assert await deaf.names() == await other.names() == []
    place.mux.set([server("one")])
    await other.noted(TOLD)
    assert "one__echo" in await other.names()
    assert not place.mux.followed
    await place.until(lambda: place.mux.followed)
    place.mux.set([server("one"), server("two")])
    await other.noted(TOLD)
    assert not place.mux.followed
    assert "two__echo" in await other.names()
    assert place.mux.followed, "nobody waits for the deaf one"


async def test_one_that_goes_is_not_waited_for(place: Place) -> None:
    agent = await place.agent()
    await agent.names()
    place.mux.set([server("one")])
    await agent.noted(TOLD)
    assert not place.mux.followed
    agent.writer.close()
    await place.until(lambda: place.mux.followed)


async def test_servers_that_have_the_same_tools_as_before_change_nothing(place: Place) -> None:
    await seen_once(place, server("one"))
    place.mux.set([server("one")])
    agent = await place.agent()
    assert "one__echo" in await agent.names()
    place.mux.renew()
    assert place.mux.settled
    assert place.mux.followed
