"""A server made with the official SDK."""

from __future__ import annotations

import sys

from mcp.server.mcpserver import Context, MCPServer
from mcp_types import Completion
from pydantic import BaseModel

server = MCPServer(sys.argv[1], instructions=f"I am {sys.argv[1]}.")


class Answer(BaseModel):
    colour: str


@server.tool(title="Add two numbers")
def add(a: int, b: int) -> int:
    return a + b


@server.tool(name="files.read")
def read(path: str) -> str:
    return f"{sys.argv[1]} read {path}"


@server.tool()
async def slow(steps: int, ctx: Context) -> str:
    for step in range(steps):
        await ctx.report_progress(step + 1, steps, f"step {step + 1}")
    return "done"


@server.tool()
async def ask(ctx: Context) -> str:
    answer = await ctx.elicit("Which colour?", Answer)
    return f"{answer.action}: {answer.data.colour if answer.action == 'accept' else ''}"


@server.tool()
def fail() -> str:
    raise RuntimeError("it broke")


@server.prompt()
def greet(who: str) -> str:
    return f"{sys.argv[1]} greets {who}"


@server.resource("memo://static")
def static() -> str:
    return f"{sys.argv[1]}'s memo"


@server.resource("memo://{name}/text")
def templated(name: str) -> str:
    return f"{sys.argv[1]}'s text of {name}"


@server.completion()  # type: ignore[no-untyped-call, untyped-decorator]
async def complete(ref: object, argument: object, context: object) -> Completion:
    return Completion(values=[f"{sys.argv[1]} completes"])


if __name__ == "__main__":
    server.run("stdio")
