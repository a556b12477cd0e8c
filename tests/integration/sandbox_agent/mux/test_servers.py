"""Several servers as one: names, routes, what agents see of them."""

from __future__ import annotations

from tests.integration.sandbox_agent.mux.kit import Place, server


async def test_tools_of_two_servers_are_called_by_their_names(place: Place) -> None:
    place.mux.set([server("one"), server("two")])
    agent = await place.agent()
    names = await agent.names()
    assert {"one__echo", "two__echo"} <= set(names)
    assert (await agent.value("one__echo", text="a"))["name"] == "one"
    assert (await agent.value("two__echo", text="b")) | {"pid": 0} == {"name": "two", "pid": 0, "text": "b"}
