"""``python -m tests.standin [--port N]``: prints its URL once it serves; ends with its stdin or by a signal."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import sys

from aiohttp import web

from tests.standin.app import build_app


def read_on(over: asyncio.Event) -> None:
    if not os.read(sys.stdin.fileno(), 4096):
        over.set()


async def serve(host: str, port: int, ends_with_stdin: bool) -> None:
    runner = web.AppRunner(build_app(), access_log=None, shutdown_timeout=0.5, handler_cancellation=True)
    await runner.setup()
    with socket.create_server((host, port), backlog=512) as sock:
        await web.SockSite(runner, sock).start()
        print(f"http://{host}:{sock.getsockname()[1]}", flush=True)
        over = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, over.set)
        if ends_with_stdin:
            loop.add_reader(sys.stdin.fileno(), read_on, over)
        await over.wait()
        await runner.cleanup()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.standin", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.add_argument("--until-eof", action="store_true", help="end when standard input is closed")
    options = parser.parse_args()
    asyncio.run(serve(options.host, options.port, options.until_eof))


if __name__ == "__main__":
    main()
