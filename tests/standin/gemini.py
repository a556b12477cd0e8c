"""Google's generateContent API."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from aiohttp import web

from tests.standin import sse
from tests.standin.script import Answer, Asked, Tool, answer


def routes() -> list[web.RouteDef]:
    return [web.post("/v1beta/models/{model}:{method}", call)]


async def call(request: web.Request) -> web.StreamResponse:
    method, body = request.match_info["method"], await request.json()
    if method == "countTokens":
        return web.json_response({"totalTokens": 10})
    reply = answer(read(body))
    model = request.match_info["model"]
    if method == "streamGenerateContent":
        return await sse.stream(request, events(model, reply))
    if body.get("generationConfig", {}).get("responseMimeType") == "application/json":
        # The CLI's own routing and next-speaker questions want JSON; any object will do.
        wanted = {"complexity_reasoning": "-", "complexity_score": 50, "reasoning": "-", "next_speaker": "user"}
        reply = Answer([json.dumps(wanted)])
    return web.json_response(shell(model, parts(reply), "STOP"))


def read(body: dict[str, Any]) -> Asked:
    tools = [
        Tool(function["name"]) for group in body.get("tools", []) for function in group.get("functionDeclarations", [])
    ]
    last = next(item for item in reversed(body["contents"]) if item.get("role") in ("user", "function"))
    results = [part["functionResponse"] for part in last["parts"] if "functionResponse" in part]
    if results:
        return Asked(result=flat(results[-1].get("response", {})), tools=tools)
    # The CLI puts what it knows of the workspace before the first prompt.
    return Asked(last["parts"][-1].get("text", "").rpartition("</session_context>")[2].strip(), tools=tools)


def flat(response: Any) -> str:
    """The text of a function's response, whatever its shape."""
    if isinstance(response, dict) and isinstance(response.get("output"), str):
        return str(response["output"])
    return json.dumps(response)


def parts(reply: Answer) -> list[dict[str, Any]]:
    if reply.tool:
        return [{"functionCall": {"name": reply.tool.name, "args": reply.arguments}}]
    return [{"text": reply.text}]


def shell(model: str, content: list[dict[str, Any]], finish: str | None) -> dict[str, Any]:
    candidate: dict[str, Any] = {"index": 0, "content": {"role": "model", "parts": content}}
    if finish:
        candidate["finishReason"] = finish
    usage = {"promptTokenCount": 10, "candidatesTokenCount": 5, "totalTokenCount": 15}
    return {"candidates": [candidate], "usageMetadata": usage, "modelVersion": model}


async def events(model: str, reply: Answer) -> AsyncIterator[tuple[str, Any]]:
    for chunk in reply.chunks:
        yield "", shell(model, [{"text": chunk}], None)
        if reply.delay_s:
            await asyncio.sleep(reply.delay_s)
    yield "", shell(model, parts(reply) if reply.tool else [{"text": ""}], "STOP")
