"""Embeddings: of equal text equal, of other text another."""

from __future__ import annotations

import base64
import hashlib
import struct
from typing import Any

from aiohttp import web

SIZE = 8


def vector(text: str) -> list[float]:
    """Numbers from -1 to 1, as single precision holds them."""
    digest = hashlib.sha256(text.encode()).digest()
    return [byte / 128 - 1 for byte in digest[:SIZE]]


async def embeddings(request: web.Request) -> web.Response:
    """OpenAI's shape, which SDKs ask for in base64."""
    body: dict[str, Any] = await request.json()
    texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
    data = []
    for index, text in enumerate(texts):
        values: Any = vector(text)
        if body.get("encoding_format") == "base64":
            values = base64.b64encode(struct.pack(f"<{SIZE}f", *values)).decode()
        data.append({"object": "embedding", "index": index, "embedding": values})
    tokens = sum(len(text.split()) for text in texts)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return web.json_response({"object": "list", "data": data, "model": body.get("model"), "usage": usage})
