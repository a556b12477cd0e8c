"""Google's generateContent API, and Code Assist, which wraps it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

from aiohttp import web

from tests.standin.embed import vector
from tests.standin.reply import Events, error, give
from tests.standin.script import Answer, Asked, Tool, answer

MODELS = ("gemini-3-pro", "gemini-3-flash")


def routes() -> list[web.RouteDef]:
    return [web.get("/v1beta/models", models), web.post("/v1beta/models/{model}:{method}", call)]


def code_assist_routes() -> list[web.RouteDef]:
    return [web.post("/v1internal:{method}", code_assist), web.get("/v1internal/operations/{name}", operation)]


async def models(request: web.Request) -> web.Response:
    return web.json_response({"models": [{"name": f"models/{name}", "displayName": name} for name in MODELS]})


async def call(request: web.Request) -> web.StreamResponse:
    return await respond(request, request.match_info["model"], await request.json(), lambda value: value)


async def code_assist(request: web.Request) -> web.StreamResponse:
    """With a bearer token only, as its users sign in."""
    if not request.headers.get("authorization", "").startswith("Bearer "):
        return web.json_response(error(401, "no token"), status=401)
    method, body = request.match_info["method"], await request.json()
    if "request" in body:
        return await respond(request, body.get("model", MODELS[0]), body["request"], wrap)
    tier = {"id": "standard-tier", "name": "Standard", "isDefault": True, "userDefinedCloudaicompanionProject": False}
    answers: dict[str, Any] = {
        "loadCodeAssist": {
            "currentTier": tier, "allowedTiers": [tier], "cloudaicompanionProject": "project-1", "gcpManaged": False,
        },
        "onboardUser": {"done": True, "response": {"cloudaicompanionProject": {"id": "project-1"}}},
    }  # fmt: skip
    return web.json_response(answers.get(method, {}))


async def operation(request: web.Request) -> web.Response:
    return web.json_response({"done": True})


def wrap(value: dict[str, Any]) -> dict[str, Any]:
    return {"response": value, "traceId": "trace-1"}


async def respond(
    request: web.Request, model: str, body: dict[str, Any], wrap: Callable[[dict[str, Any]], dict[str, Any]]
) -> web.StreamResponse:
    """Whatever ``method`` the path names."""
    method = request.match_info["method"]
    if method == "countTokens":
        return web.json_response({"totalTokens": 10})
    if method == "embedContent":
        return web.json_response({"embedding": embedded(body)})
    if method == "batchEmbedContents":
        return web.json_response({"embeddings": [embedded(each) for each in body["requests"]]})
    reply = answer(read(body))
    if body.get("generationConfig", {}).get("responseMimeType") == "application/json":
        # The CLI's own routing and next-speaker questions want JSON; any object will do.
        wanted = {"complexity_reasoning": "-", "complexity_score": 50, "reasoning": "-", "next_speaker": "user"}
        reply = Answer([json.dumps(wanted)])
    streamed = method == "streamGenerateContent"
    return await give(
        request,
        reply,
        wrapped(events(model, reply), wrap) if streamed else None,
        lambda: wrap(shell(model, reply, parts(reply), "STOP")),
    )


async def wrapped(events: Events, wrap: Callable[[dict[str, Any]], dict[str, Any]]) -> Events:
    async for name, value in events:
        yield name, wrap(value)


def embedded(body: dict[str, Any]) -> dict[str, Any]:
    return {"values": vector("".join(part.get("text", "") for part in body["content"]["parts"]))}


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


def shell(model: str, reply: Answer, content: list[dict[str, Any]], finish: str | None) -> dict[str, Any]:
    candidate: dict[str, Any] = {"index": 0, "content": {"role": "model", "parts": content}}
    if finish:
        candidate["finishReason"] = finish
    used = reply.usage
    usage = {
        "promptTokenCount": used.input,
        "candidatesTokenCount": used.output,
        "cachedContentTokenCount": used.cached,
        "totalTokenCount": used.input + used.output,
    }
    return {"candidates": [candidate], "usageMetadata": usage, "modelVersion": model}


async def events(model: str, reply: Answer) -> Events:
    for chunk in reply.chunks:
        yield "", shell(model, reply, [{"text": chunk}], None)
        if reply.delay_s:
            await asyncio.sleep(reply.delay_s)
    yield "", shell(model, reply, parts(reply) if reply.tool else [{"text": ""}], "STOP")
