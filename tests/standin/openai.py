"""OpenAI's Responses API (Codex), chat completions (opencode) and embeddings, and the same below ChatGPT's address."""

from __future__ import annotations

import asyncio
import itertools
import json
from typing import Any

from aiohttp import web

from tests.standin.embed import embeddings
from tests.standin.record import note
from tests.standin.reply import Events, Handler, error, give
from tests.standin.script import Answer, Asked, Tool, Usage, answer

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
        web.get("/v1/models/{name}", model),
        web.get("/v1/responses", spoken),
        web.post("/v1/responses", responses),
        web.post("/v1/responses/input_tokens", count),
        web.post("/v1/chat/completions", chat),
        web.post("/v1/embeddings", embeddings),
    ]


def chatgpt_routes() -> list[web.RouteDef]:
    """What Codex asks for with the tokens of a ChatGPT account."""
    return [
        web.get("/backend-api/codex/models", signed_in(codex_models)),
        web.get("/backend-api/codex/responses", signed_in(spoken)),
        web.post("/backend-api/codex/responses", signed_in(responses)),
        web.get("/backend-api/wham/{what:.*}", signed_in(account)),
    ]


def signed_in(handler: Handler) -> Handler:
    async def asked(request: web.Request) -> web.StreamResponse:
        token = request.headers.get("authorization", "").startswith("Bearer ")
        if not token or not request.headers.get("chatgpt-account-id"):
            return web.json_response(error(401, "no token, or no account"), status=401)
        return await handler(request)

    return asked


def described(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 1_760_000_000, "owned_by": "standin"}


async def models(request: web.Request) -> web.Response:
    return web.json_response({"object": "list", "data": [described(name) for name in MODELS]})


async def model(request: web.Request) -> web.Response:
    return web.json_response(described(request.match_info["name"]))


async def codex_models(request: web.Request) -> web.Response:
    return web.json_response({"models": []})


async def account(request: web.Request) -> web.Response:
    """Codex wants to see the account that it was told to use among those that the token is for."""
    if request.match_info["what"] != "accounts/check":
        return web.json_response({"plan_type": "plus"})
    found = {"id": request.headers["chatgpt-account-id"], "workspace_backend_origin": "https://chatgpt.com"}
    return web.json_response({"accounts": [found | {"account_routing_override": "us"}]})


async def count(request: web.Request) -> web.Response:
    return web.json_response({"object": "response.input_tokens", "input_tokens": len(await request.read()) // 4})


async def responses(request: web.Request) -> web.StreamResponse:
    body = await request.json()
    reply = answer(read_responses(body))
    events = response_events(body, reply) if body.get("stream") else None
    return await give(request, reply, events, lambda: response_shell(body, next(_numbers), reply, [item_of(reply)]))


async def spoken(request: web.Request) -> web.StreamResponse:
    """The Responses API over WebSocket: each ``response.create`` is answered by its events, a message each. What an
    earlier response of the connection was given need not be sent again."""
    if request.headers.get("upgrade", "").lower() != "websocket":
        return web.json_response(error(405, "POST, or a WebSocket"), status=405)
    socket = web.WebSocketResponse(max_msg_size=64 * 2**20)
    await socket.prepare(request)
    known: dict[str, dict[str, Any]] = {}
    async for message in socket:
        body = message.json()
        note(request, body)
        if body.get("type") != "response.create":
            continue
        before = known.get(body.get("previous_response_id") or "", {})
        whole = {**before, **body, "input": before.get("input", []) + body.get("input", [])}
        reply = answer(read_responses(whole)) if body.get("generate", True) else Answer(usage=Usage(0, 0))
        if reply.fault.status:
            await socket.send_json({**error(reply.fault.status, "as asked"), "status": reply.fault.status})
            continue
        sent = 0
        async for _, event in response_events(whole, reply, nothing=not body.get("generate", True)):
            if reply.fault.cut is not None and sent >= reply.fault.cut:
                assert request.transport is not None
                request.transport.close()
                return socket
            await socket.send_json(event)
            sent += 1
        made = event["response"]
        known[made["id"]] = {**whole, "input": whole["input"] + made["output"]}
    return socket


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


def item_of(reply: Answer) -> dict[str, Any]:
    if reply.tool:
        return call_item(reply)
    content = [{"type": "output_text", "text": reply.text, "annotations": []}]
    common = {"id": f"msg_{next(_numbers)}", "type": "message", "role": "assistant", "status": "completed"}
    return common | {"content": content}


def response_shell(body: dict[str, Any], number: int, reply: Answer, output: list[Any]) -> dict[str, Any]:
    used = reply.usage
    usage = {
        "input_tokens": used.input,
        "input_tokens_details": {"cached_tokens": used.cached},
        "output_tokens": used.output,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": used.input + used.output,
    }
    return {
        "id": f"resp_{number}", "object": "response", "created_at": 1_760_000_000, "status": "completed",
        "model": body.get("model", MODELS[0]), "output": output, "usage": usage, "parallel_tool_calls": True,
        "tool_choice": "auto", "tools": [],
    }  # fmt: skip


async def response_events(body: dict[str, Any], reply: Answer, *, nothing: bool = False) -> Events:
    order = itertools.count()
    number = next(_numbers)

    def event(kind: str, **values: Any) -> tuple[str, Any]:
        return kind, {"type": kind, "sequence_number": next(order), **values}

    yield event(
        "response.created",
        response=response_shell(body, number, reply, []) | {"status": "in_progress", "usage": None},
    )
    if nothing:
        yield event("response.completed", response=response_shell(body, number, reply, []))
        return
    item = item_of(reply)
    if reply.tool:
        yield event("response.output_item.added", output_index=0, item=item | {"status": "in_progress"})
    else:
        place = {"item_id": item["id"], "output_index": 0, "content_index": 0}
        yield event("response.output_item.added", output_index=0, item=item | {"status": "in_progress", "content": []})
        empty = {"type": "output_text", "text": "", "annotations": []}
        yield event("response.content_part.added", **place, part=empty)
        for chunk in reply.chunks:
            yield event("response.output_text.delta", **place, delta=chunk, logprobs=[])
            if reply.delay_s:
                await asyncio.sleep(reply.delay_s)
        yield event("response.output_text.done", **place, text=reply.text, logprobs=[])
        yield event("response.content_part.done", **place, part=item["content"][0])
    yield event("response.output_item.done", output_index=0, item=item)
    yield event("response.completed", response=response_shell(body, number, reply, [item]))


async def chat(request: web.Request) -> web.StreamResponse:
    body = await request.json()
    reply = answer(read_chat(body))
    message: dict[str, Any] = {"role": "assistant", "content": reply.text}
    if reply.tool:
        message["tool_calls"] = [chat_call(reply)]
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls" if reply.tool else "stop"}
    return await give(
        request,
        reply,
        chat_events(body, reply) if body.get("stream") else None,
        lambda: chat_shell(body, "chat.completion") | {"choices": [choice], "usage": chat_usage(reply)},
    )


def read_chat(body: dict[str, Any]) -> Asked:
    tools = [Tool(tool["function"]["name"]) for tool in body.get("tools", [])]
    last = body["messages"][-1]
    if last["role"] == "tool":
        return Asked(result=flat(last["content"]), tools=tools)
    said = [item for item in body["messages"] if item["role"] == "user"]
    return Asked(flat(said[-1]["content"]) if said else "", tools=tools)


def chat_shell(body: dict[str, Any], kind: str) -> dict[str, Any]:
    return {"id": "chatcmpl-standin", "object": kind, "created": 1, "model": body.get("model")}


def chat_usage(reply: Answer) -> dict[str, Any]:
    used = reply.usage
    return {
        "prompt_tokens": used.input,
        "completion_tokens": used.output,
        "total_tokens": used.input + used.output,
        "prompt_tokens_details": {"cached_tokens": used.cached},
    }


def chat_call(reply: Answer) -> dict[str, Any]:
    assert reply.tool is not None
    function = {"name": reply.tool.name, "arguments": json.dumps(reply.arguments)}
    return {"id": f"call_{next(_numbers)}", "type": "function", "function": function}


async def chat_events(body: dict[str, Any], reply: Answer) -> Events:
    def chunk(delta: dict[str, Any], finish: str | None = None) -> tuple[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return "", chat_shell(body, "chat.completion.chunk") | {"choices": [choice]}

    yield chunk({"role": "assistant", "content": ""})
    if reply.tool:
        yield chunk({"tool_calls": [{"index": 0, **chat_call(reply)}]})
    for text in reply.chunks:
        yield chunk({"content": text})
        if reply.delay_s:
            await asyncio.sleep(reply.delay_s)
    yield chunk({}, "tool_calls" if reply.tool else "stop")
    if (body.get("stream_options") or {}).get("include_usage"):
        yield "", chat_shell(body, "chat.completion.chunk") | {"choices": [], "usage": chat_usage(reply)}
    yield "", "[DONE]"
