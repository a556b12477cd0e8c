"""The official SDK on both sides: its client through the shim, its servers behind the multiplexer."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import mcp_types
import pytest
from mcp import Client, MCPError, StdioServerParameters

from tests.integration.sandbox_agent.mux.kit import Place

SERVER = Path(__file__).with_name("sdk_server.py")
Mode = Literal["auto", "legacy"]


def sdk_server(name: str) -> dict[str, Any]:
    return {"name": name, "command": sys.executable, "args": [str(SERVER), name], "env": []}


@asynccontextmanager
async def client(place: Place, mode: Mode, **callbacks: Any) -> AsyncIterator[Client]:
    entry = place.mux.entry()
    parameters = StdioServerParameters(command=entry["command"], args=entry["args"], env={})
    async with Client(parameters, mode=mode, read_timeout_seconds=20, **callbacks) as made:
        yield made


def text(result: Any) -> str:
    found: str = result.content[0].text
    return found


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_a_client_of_either_era_lists_calls_and_reads(place: Place, mode: Mode) -> None:
    place.mux.set([sdk_server("one"), sdk_server("two")])
    await place.settled()
    async with client(place, mode) as agent:
        assert agent.protocol_version == "2025-11-25"
        assert agent.server_capabilities.completions is not None
        assert "I am two." in (agent.instructions or "")
        tools = {tool.name: tool for tool in (await agent.list_tools()).tools}
        assert {"one__add", "two__add", "one__files_read"} <= set(tools)
        assert tools["one__add"].title == "Add two numbers"
        assert tools["one__add"].output_schema is not None
        added = await agent.call_tool("two__add", {"a": 2, "b": 3})
        assert added.structured_content == {"result": 5}
        assert text(await agent.call_tool("one__files_read", {"path": "x"})) == "one read x"
        failed = await agent.call_tool("one__fail", {})
        assert failed.is_error
        assert text(failed) == "Error executing tool fail"

        prompts = [prompt.name for prompt in (await agent.list_prompts()).prompts]
        assert prompts == ["one__greet", "two__greet"]
        prompt = await agent.get_prompt("two__greet", {"who": "Ann"})
        assert prompt.messages[0].content.text == "two greets Ann"  # type: ignore[union-attr]

        uris = [str(each.uri) for each in (await agent.list_resources()).resources]
        assert uris == ["memo://static", "cortex:two:memo://static"]
        for uri, expected in (
            (uris[0], "one's memo"),
            (uris[1], "two's memo"),
            ("memo://x/text", "one's text of x"),
            ("cortex:two:memo://x/text", "two's text of x"),
        ):
            (content,) = (await agent.read_resource(uri)).contents
            assert content.text == expected  # type: ignore[union-attr]
        templates = [each.uri_template for each in (await agent.list_resource_templates()).resource_templates]
        assert templates == ["memo://{name}/text", "cortex:two:memo://{name}/text"]
        with pytest.raises(MCPError, match="unknown resource"):
            await agent.read_resource("nowhere://at/all")

        ref = mcp_types.PromptReference(type="ref/prompt", name="two__greet")
        found = await agent.complete(ref, {"name": "who", "value": "A"})
        assert found.completion.values == ["two completes"]


async def test_progress_and_questions_reach_the_client(place: Place) -> None:
    place.mux.set([sdk_server("one")])
    seen: list[tuple[float, float | None, str | None]] = []

    async def note(progress: float, total: float | None, message: str | None) -> None:
        seen.append((progress, total, message))

    async def answer(_: Any, params: mcp_types.ElicitRequestParams) -> mcp_types.ElicitResult:
        assert params.message == "Which colour?"
        return mcp_types.ElicitResult(action="accept", content={"colour": "blue"})

    async with client(place, "auto", elicitation_callback=answer) as agent:
        await agent.list_tools()
        assert text(await agent.call_tool("one__slow", {"steps": 3}, progress_callback=note)) == "done"
        assert seen == [(1, 3, "step 1"), (2, 3, "step 2"), (3, 3, "step 3")]
        assert text(await agent.call_tool("one__ask", {})) == "accept: blue"


async def test_a_client_is_told_of_servers_that_come(place: Place) -> None:
    told = asyncio.Event()

    async def hear(message: Any) -> None:
        if isinstance(message, mcp_types.ToolListChangedNotification):
            told.set()

    async with client(place, "legacy", message_handler=hear) as agent:
        assert (await agent.list_tools()).tools == []
        place.mux.set([sdk_server("one")])
        async with asyncio.timeout(20):
            await told.wait()
        assert "one__add" in [tool.name for tool in (await agent.list_tools()).tools]
