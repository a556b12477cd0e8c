"""Anthropic's Messages API."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from typing import Any

from aiohttp import web

from tests.standin.reply import Events, give
from tests.standin.script import Answer, Asked, Tool, answer

MODELS = ("claude-opus-5-5", "claude-haiku-4-5")
LOADER = "ToolSearch"
"""Claude Code names tools of MCP servers, but describes them only to a model that asks."""
_numbers = itertools.count(1)


def routes() -> list[web.RouteDef]:
    return [
        web.route("HEAD", "/api/hello", hello),
        web.get("/v1/models", models),
        web.post("/v1/messages/count_tokens", count_tokens),
        web.post("/v1/messages", messages),
    ]


async def hello(request: web.Request) -> web.Response:
    return web.Response()


async def models(request: web.Request) -> web.Response:
    data = [
        {"type": "model", "id": name, "display_name": name, "created_at": "2026-01-01T00:00:00Z"} for name in MODELS
    ]
    return web.json_response({"data": data, "has_more": False, "first_id": MODELS[0], "last_id": MODELS[-1]})


async def count_tokens(request: web.Request) -> web.Response:
    return web.json_response({"input_tokens": len(await request.read()) // 4})


async def messages(request: web.Request) -> web.StreamResponse:
    body = await request.json()
    reply = answer(read(body))
    stop = "tool_use" if reply.tool else "end_turn"
    return await give(
        request,
        reply,
        events(body, reply) if body.get("stream") else None,
        lambda: message(body, reply, [block(reply)], stop),
    )


def read(body: dict[str, Any]) -> Asked:
    tools = [Tool(tool["name"]) for tool in body.get("tools", [])]
    loader = next((tool for tool in tools if tool.name == LOADER), None)
    # The CLI adds messages of role "system" to what the user said.
    messages = [item for item in body["messages"] if item["role"] != "system"]
    deferred = (
        [Tool(name) for name in re.findall(r"^mcp__\S+$", said(body["messages"]), re.MULTILINE)] if loader else []
    )
    results = results_in(messages[-1])
    if results:
        if results[-1]["tool_use_id"] not in calls(messages, LOADER):
            return Asked(result=flat(results[-1].get("content", "")), tools=tools)
        tools += deferred
    typed = [item for item in messages if item["role"] == "user" and not results_in(item)]
    return Asked(own(typed[-1]) if typed else "", tools=tools, loader=loader, deferred=deferred)


def parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def results_in(message: dict[str, Any]) -> list[dict[str, Any]]:
    return [part for part in parts(message) if part["type"] == "tool_result"]


def said(messages: list[dict[str, Any]]) -> str:
    """All text, whoever's."""
    return "\n".join(part["text"] for message in messages for part in parts(message) if part["type"] == "text")


def own(message: dict[str, Any]) -> str:
    """What the user typed."""
    texts = [part["text"] for part in parts(message) if part["type"] == "text"]
    return "\n".join([text for text in texts if not text.startswith("<system-reminder>")] or texts)


def calls(messages: list[dict[str, Any]], name: str) -> set[str]:
    """Ids of the calls of a tool."""
    found = (part for message in messages for part in parts(message) if part["type"] == "tool_use")
    return {part["id"] for part in found if part["name"] == name}


def flat(content: Any) -> str:
    """The text of a tool's result."""
    if isinstance(content, str):
        return content
    return " ".join(part.get("text", part["type"]) for part in content)


def block(reply: Answer) -> dict[str, Any]:
    if reply.tool:
        return {"type": "tool_use", "id": f"toolu_{next(_numbers)}", "name": reply.tool.name, "input": reply.arguments}
    return {"type": "text", "text": reply.text}


def message(body: dict[str, Any], reply: Answer, content: list[Any], stop: str | None) -> dict[str, Any]:
    return {
        "id": f"msg_{next(_numbers)}",
        "type": "message",
        "role": "assistant",
        "model": body.get("model", MODELS[0]),
        "content": content,
        "stop_reason": stop,
        "stop_sequence": None,
        "usage": {
            "input_tokens": reply.usage.input - reply.usage.cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": reply.usage.cached,
            "output_tokens": reply.usage.output if stop else 1,
        },
    }


async def events(body: dict[str, Any], reply: Answer) -> Events:
    def event(kind: str, **values: Any) -> tuple[str, Any]:
        return kind, {"type": kind, **values}

    yield event("message_start", message=message(body, reply, [], None))
    start = block(reply)
    start["input" if reply.tool else "text"] = {} if reply.tool else ""
    yield event("content_block_start", index=0, content_block=start)
    if reply.tool:
        part = {"type": "input_json_delta", "partial_json": json.dumps(reply.arguments)}
        yield event("content_block_delta", index=0, delta=part)
    for chunk in reply.chunks:
        yield event("content_block_delta", index=0, delta={"type": "text_delta", "text": chunk})
        if reply.delay_s:
            await asyncio.sleep(reply.delay_s)
    yield event("content_block_stop", index=0)
    stop = {"stop_reason": "tool_use" if reply.tool else "end_turn", "stop_sequence": None}
    yield event("message_delta", delta=stop, usage={"output_tokens": reply.usage.output})
    yield event("message_stop")
