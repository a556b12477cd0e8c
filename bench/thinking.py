"""``python -m bench.thinking SECONDS``: a provider of Anthropic's shape that thinks so long, then streams a few words.

Prints its URL once it serves; ends with its standard input.
"""

from __future__ import annotations

import asyncio
import json
import sys

from aiohttp import web

WORDS = ("I", " thought", " about", " it")


def app(think_s: float) -> web.Application:
    async def messages(request: web.Request) -> web.StreamResponse:
        await request.read()
        await asyncio.sleep(think_s)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for word in WORDS:
            delta = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": word}}
            await response.write(f"event: content_block_delta\ndata: {json.dumps(delta)}\n\n".encode())
        return response

    made = web.Application()
    made.router.add_post("/v1/messages", messages)
    return made


async def serve(think_s: float) -> None:
    runner = web.AppRunner(app(think_s), access_log=None, shutdown_timeout=0.5)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(f"http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await runner.cleanup()


if __name__ == "__main__":
    asyncio.run(serve(float(sys.argv[1])))
