"""OpenAI's Responses API (Codex) and chat completions (opencode)."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from typing import Any

from aiohttp import web

from tests.standin import sse
from tests.standin.script import Answer, Asked, Tool, answer

MODELS = ("gpt-5.5", "gpt-5.4-mini")
CODE_MODE = """\
const wanted = %s;
const name = ALL_TOOLS.map(tool => tool.name).find(name => name === wanted || name.endsWith(wanted));
if (!name) { text(`no tool ${wanted} among ${ALL_TOOLS.map(tool => tool.name)}`); exit(); }
const result = await tools[name](%s);
text(typeof result === "string" ? result : result.output ?? JSON.stringify(result.content ?? result));
"""
"""Codex's newer models are given one tool, ``exec``, which runs JavaScript that calls the others."""
_numbers = itertools.count(1)


def routes() -> list[web.RouteDef]:
    return [
        web.get("/v1/models", models),
        web.get("/v1/responses", upgrade),
        web.post("/v1/responses", responses),
        web.post("/v1/chat/completions", chat),
    ]


async def models(request: web.Request) -> web.Response:
    data = [{"id": name, "object": "model", "created": 1_760_000_000, "owned_by": "standin"} for name in MODELS]
    return web.json_response({"object": "list", "data": data})


async def upgrade(request: web.Request) -> web.Response:
    """426 is what makes Codex fall back to POST at once."""
    return web.json_response({"error": {"message": "no WebSocket here"}}, status=426)


async def responses(request: web.Request) -> web.StreamResponse:
    body = await request.json()
    return await sse.stream(request, response_events(body, answer(read_responses(body))))


def read_responses(body: dict[str, Any]) -> Asked:
    items = body["input"]
    if isinstance(items, str):
        return Asked(items)
    tools = response_tools(body.get("tools", []))
    for item in items:
        if item.get("type") == "additional_tools":
            tools += response_tools(item["tools"])
    last = items[-1]
    if str(last.get("type", "")).endswith("_output"):
        return Asked(result=flat(last.get("output", "")), tools=tools)
    said = [item for item in items if item.get("role") == "user"]
    runner = next((tool for tool in tools if tool.kind == "custom" and tool.name == "exec"), None)
    return Asked(flat(said[-1]["content"]) if said else "", tools=tools, runner=runner)


def response_tools(tools: list[dict[str, Any]], namespace: str = "") -> list[Tool]:
    found: list[Tool] = []
    for tool in tools:
        if tool.get("type") == "namespace":
            found += response_tools(tool.get("tools", []), tool["name"])
        elif tool.get("name"):
            found.append(Tool(tool["name"], namespace, tool["type"]))
    return found


def flat(content: Any) -> str:
    """The text of content parts, of a tool's output, or of one wrapped in JSON."""
    if isinstance(content, str):
        return content
    if isinstance(content, dict):
        return flat(content.get("content", json.dumps(content)))
    return " ".join(part.get("text", "") for part in content)


def call_item(reply: Answer) -> dict[str, Any]:
    assert reply.tool is not None
    number = next(_numbers)
    item = {"id": f"fc_{number}", "call_id": f"call_{number}", "name": reply.tool.name, "status": "completed"}
    if reply.tool.namespace:
        item["namespace"] = reply.tool.namespace
    if reply.tool.kind == "custom":
        script = CODE_MODE % (json.dumps(reply.wanted), json.dumps(reply.arguments))
        return item | {"type": "custom_tool_call", "input": script}
    return item | {"type": "function_call", "arguments": json.dumps(reply.arguments)}


async def response_events(body: dict[str, Any], reply: Answer) -> AsyncIterator[tuple[str, Any]]:
    order = itertools.count()
    number = next(_numbers)

    def event(kind: str, **values: Any) -> tuple[str, Any]:
        return kind, {"type": kind, "sequence_number": next(order), **values}

    shell = {"id": f"resp_{number}", "object": "response", "model": body.get("model", MODELS[0]), "output": []}
    yield event("response.created", response=shell | {"status": "in_progress"})
    if reply.tool:
        item = call_item(reply)
        yield event("response.output_item.added", output_index=0, item=item | {"status": "in_progress"})
    else:
        item = {"id": f"msg_{number}", "type": "message", "role": "assistant", "status": "completed"}
        place = {"item_id": item["id"], "output_index": 0, "content_index": 0}
        yield event("response.output_item.added", output_index=0, item=item | {"status": "in_progress", "content": []})
        for chunk in reply.chunks:
            yield event("response.output_text.delta", **place, delta=chunk)
            if reply.delay_s:
                await asyncio.sleep(reply.delay_s)
        yield event("response.output_text.done", **place, text=reply.text)
        item["content"] = [{"type": "output_text", "text": reply.text, "annotations": []}]
    yield event("response.output_item.done", output_index=0, item=item)
    usage = {
        "input_tokens": 10,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": 5,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 15,
    }
    yield event("response.completed", response=shell | {"status": "completed", "output": [item], "usage": usage})


async def chat(request: web.Request) -> web.StreamResponse:
    body = await request.json()
    reply = answer(read_chat(body))
    if body.get("stream"):
        return await sse.stream(request, chat_events(body, reply))
    choice = {"index": 0, "message": {"role": "assistant", "content": reply.text}, "finish_reason": "stop"}
    return web.json_response(chat_shell(body, "chat.completion") | {"choices": [choice]})


def read_chat(body: dict[str, Any]) -> Asked:
    tools = [Tool(tool["function"]["name"]) for tool in body.get("tools", [])]
    last = body["messages"][-1]
    if last["role"] == "tool":
        return Asked(result=flat(last["content"]), tools=tools)
    said = [item for item in body["messages"] if item["role"] == "user"]
    return Asked(flat(said[-1]["content"]) if said else "", tools=tools)


def chat_shell(body: dict[str, Any], kind: str) -> dict[str, Any]:
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    return {"id": "chatcmpl-standin", "object": kind, "created": 1, "model": body.get("model"), "usage": usage}


async def chat_events(body: dict[str, Any], reply: Answer) -> AsyncIterator[tuple[str, Any]]:
    def chunk(delta: dict[str, Any], finish: str | None = None) -> tuple[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return "", chat_shell(body, "chat.completion.chunk") | {"choices": [choice]}

    yield chunk({"role": "assistant", "content": ""})
    if reply.tool:
        function = {"name": reply.tool.name, "arguments": json.dumps(reply.arguments)}
        yield chunk(
            {"tool_calls": [{"index": 0, "id": f"call_{next(_numbers)}", "type": "function", "function": function}]}
        )
    for text in reply.chunks:
        yield chunk({"content": text})
        if reply.delay_s:
            await asyncio.sleep(reply.delay_s)
    yield chunk({}, "tool_calls" if reply.tool else "stop")
    yield "", "[DONE]"
