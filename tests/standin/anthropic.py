"""Anthropic's Messages API."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from typing import Any

from aiohttp import web

from tests.standin import sse
from tests.standin.script import Answer, Asked, Tool, answer

MODELS = ("claude-opus-4-8", "claude-sonnet-4-8", "claude-haiku-4-5")
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
    if body.get("stream"):
        return await sse.stream(request, events(body, reply))
    return web.json_response(message(body, [block(reply)], "tool_use" if reply.tool else "end_turn"))


def read(body: dict[str, Any]) -> Asked:
    tools = [Tool(tool["name"]) for tool in body.get("tools", [])]
    # The CLI adds messages of role "system" to what the user said.
    last = next(item for item in reversed(body["messages"]) if item["role"] == "user")
    content = last["content"]
    if isinstance(content, str):
        return Asked(content, tools=tools)
    results = [part for part in content if part["type"] == "tool_result"]
    if results:
        return Asked(result=flat(results[-1].get("content", "")), tools=tools)
    texts = [part["text"] for part in content if part["type"] == "text"]
    own = [text for text in texts if not text.startswith("<system-reminder>")]
    return Asked("\n".join(own or texts), tools=tools)


def flat(content: Any) -> str:
    """The text of a tool's result."""
    if isinstance(content, str):
        return content
    return " ".join(part.get("text", part["type"]) for part in content)


def block(reply: Answer) -> dict[str, Any]:
    if reply.tool:
        return {"type": "tool_use", "id": f"toolu_{next(_numbers)}", "name": reply.tool.name, "input": reply.arguments}
    return {"type": "text", "text": reply.text}


def message(body: dict[str, Any], content: list[Any], stop: str | None) -> dict[str, Any]:
    return {
        "id": "msg_standin",
        "type": "message",
        "role": "assistant",
        "model": body.get("model", MODELS[0]),
        "content": content,
        "stop_reason": stop,
        "stop_sequence": None,
        "usage": {"input_tokens": 10, "output_tokens": 5, "cache_read_input_tokens": 0},
    }


async def events(body: dict[str, Any], reply: Answer) -> AsyncIterator[tuple[str, Any]]:
    def event(kind: str, **values: Any) -> tuple[str, Any]:
        return kind, {"type": kind, **values}

    yield event("message_start", message=message(body, [], None))
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
    yield event("message_delta", delta=stop, usage={"output_tokens": max(1, len(reply.chunks))})
    yield event("message_stop")
