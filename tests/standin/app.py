"""One server for all providers, each below its name, and a record of what they were asked.

``GET /_requests`` answers the record, oldest first; ``DELETE /_requests`` empties it.
"""

from __future__ import annotations

from collections import Counter, deque

from aiohttp import web

from tests.standin import anthropic, gemini, ollama, openai
from tests.standin.record import MAX_RECORDS, RECORDS, forget, record, requests
from tests.standin.reply import SEEN

PROVIDERS = {
    "anthropic": anthropic.routes,
    "openai": openai.routes,
    "gemini": gemini.routes,
    "ollama": ollama.routes,
    "chatgpt": openai.chatgpt_routes,
    "codeassist": gemini.code_assist_routes,
}


def build_app() -> web.Application:
    """``/NAME`` of each provider is a base URL as [gateway.providers.*] wants it."""
    app = web.Application(client_max_size=64 * 2**20, middlewares=[record])
    app[RECORDS] = deque(maxlen=MAX_RECORDS)
    app[SEEN] = Counter()
    app[ollama.LOADED] = {}
    app.add_routes([web.get("/_requests", requests), web.delete("/_requests", forget)])
    for name, routes in PROVIDERS.items():
        part = web.Application()
        part.add_routes(routes())
        app.add_subapp(f"/{name}", part)
    return app
