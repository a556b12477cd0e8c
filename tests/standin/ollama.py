"""Ollama's own API, its OpenAI face, and which models are loaded."""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web

from tests.standin import openai
from tests.standin.embed import embeddings, vector
from tests.standin.reply import Events, give
from tests.standin.script import Answer, Asked, Tool, answer

MODELS = ("qwen3:8b", "nomic-embed-text:latest")
AT = "2026-01-01T00:00:00Z"
LOADED: web.AppKey[dict[str, Any]] = web.AppKey("loaded", dict)
"""``keep_alive`` by model, as it was asked for last."""


def routes() -> list[web.RouteDef]:
    return [
        web.get("/api/version", version),
        web.get("/api/tags", tags),
        web.get("/api/ps", loaded),
        web.post("/api/chat", chat),
        web.post("/api/generate", generate),
        web.post("/api/embed", embed),
        web.get("/v1/models", tags_of_openai),
        web.post("/v1/chat/completions", openai.chat),
        web.post("/v1/embeddings", embeddings),
    ]


async def version(request: web.Request) -> web.Response:
    return web.json_response({"version": "0.12.0"})


async def tags(request: web.Request) -> web.Response:
    return web.json_response({"models": [{"name": name, "model": name, "modified_at": AT} for name in MODELS]})


async def tags_of_openai(request: web.Request) -> web.Response:
    return web.json_response({"object": "list", "data": [openai.described(name) for name in MODELS]})


async def loaded(request: web.Request) -> web.Response:
    models = request.config_dict[LOADED]
    return web.json_response(
        {"models": [{"name": name, "model": name, "keep_alive": kept} for name, kept in models.items()]}
    )


async def chat(request: web.Request) -> web.StreamResponse:
    body = await request.json()
    messages = body.get("messages", [])
    if not messages:
        return load(request, body)
    tools = [Tool(tool["function"]["name"]) for tool in body.get("tools", [])]
    if messages[-1]["role"] == "tool":
        asked = Asked(result=messages[-1]["content"], tools=tools)
    else:
        asked = Asked(messages[-1]["content"], tools=tools)
    return await respond(request, body, answer(asked), lambda text: {"message": {"role": "assistant", "content": text}})


async def generate(request: web.Request) -> web.StreamResponse:
    body = await request.json()
    if not body.get("prompt"):
        return load(request, body)
    return await respond(request, body, answer(Asked(body["prompt"])), lambda text: {"response": text})


def load(request: web.Request, body: dict[str, Any]) -> web.Response:
    """A request that asks nothing loads its model, or lets go of it."""
    keep(request, body)
    reason = "unload" if body.get("keep_alive") == 0 else "load"
    return web.json_response({"model": body["model"], "created_at": AT, "done": True, "done_reason": reason})


def keep(request: web.Request, body: dict[str, Any]) -> None:
    models = request.config_dict[LOADED]
    if body.get("keep_alive") == 0:
        models.pop(body["model"], None)
    else:
        models[body["model"]] = body.get("keep_alive", models.get(body["model"], "5m"))


async def respond(request: web.Request, body: dict[str, Any], reply: Answer, said: Any) -> web.StreamResponse:
    """Lines of JSON unless ``stream`` is false."""
    keep(request, body)

    def part(text: str, **more: Any) -> dict[str, Any]:
        return {"model": body["model"], "created_at": AT, **said(text), "done": False, **more}

    def last(text: str) -> dict[str, Any]:
        made = part(text, done=True, done_reason="stop", total_duration=5_000_000, load_duration=1_000_000)
        if reply.tool:
            call = {"function": {"name": reply.tool.name, "arguments": reply.arguments}}
            made["message"]["tool_calls"] = [call]
        return made | {"prompt_eval_count": reply.usage.input, "eval_count": reply.usage.output}

    async def parts() -> Events:
        for chunk in reply.chunks:
            yield "", part(chunk)
            if reply.delay_s:
                await asyncio.sleep(reply.delay_s)
        yield "", last("")

    streamed = parts() if body.get("stream", True) else None
    return await give(request, reply, streamed, lambda: last(reply.text), lines=True)


async def embed(request: web.Request) -> web.Response:
    body = await request.json()
    keep(request, body)
    texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
    count = sum(len(text.split()) for text in texts)
    made = {"model": body["model"], "embeddings": [vector(text) for text in texts], "prompt_eval_count": count}
    return web.json_response(made)
