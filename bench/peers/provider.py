"""The stand-in provider of the gateway's benchmark, OpenAI's shape: ``python -m bench.peers.provider PORT``.

Answers a POST with some 700 B of JSON, or, where its body asks to stream, with 20 events 10 ms apart; each says
when it was sent (``time.monotonic_ns()``). A model ``think-N`` takes N ms before it answers, ``every-N`` has its
events N ms apart. ``GET /count`` tells how many POSTs there were, ``/first`` when the first of them was whole (0:
none yet), ``/gone`` waits for the next stream that is broken off and tells when; any other GET is answered as
``/count``.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from typing import ClassVar, cast

import uvloop

from bench.lib import ready

EVENTS, EVERY_S = 20, 0.01
LOOKED_AT = 65_536
"""So much of a body is searched for what it asks."""
_STREAM = re.compile(rb'"stream"\s*:\s*true')
_THINK = re.compile(rb"think-(\d+)")
_EVERY = re.compile(rb"every-(\d+)")
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding: *chunked", re.IGNORECASE)


def answer() -> bytes:
    """The JSON answer, head and all."""
    body = json.dumps(
        {
            "id": "chatcmpl-bench",
            "object": "chat.completion",
            "created": 1,
            "model": "bench",
            "choices": [
                {"index": 0, "message": {"role": "assistant", "content": "word " * 80}, "finish_reason": "stop"}
            ],
            "usage": {"prompt_tokens": 100, "completion_tokens": 80, "total_tokens": 180},
        }
    ).encode()
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)


ANSWER = answer()
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(content: str, finish: str | None = None) -> bytes:
    """One server-sent event."""
    fact = {
        "id": "chatcmpl-bench",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "bench",
        "choices": [{"index": 0, "delta": {"content": content} if content else {}, "finish_reason": finish}],
    }
    return b"data: %s\n\n" % json.dumps(fact).encode()


EVENT = event("at=%d;")
STREAM_END = chunk(event("", "stop")) + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


def stamped(now_ns: int) -> bytes:
    """A chunk with an event that says when it was sent."""
    return chunk(EVENT % now_ns)


class Provider(asyncio.Protocol):
    """One connection, one request at a time."""

    served = 0
    first_ns = 0
    waiting: ClassVar[list[Provider]] = []
    """Those that are to be told of the next stream that is broken off."""

    def __init__(self) -> None:
        self._buffer = b""
        self._left = -1
        self._chunked = False
        self._get = False
        self._asked = b""
        self._timer: asyncio.TimerHandle | None = None
        self._every_s = EVERY_S
        self._streaming = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self in Provider.waiting:
            Provider.waiting.remove(self)
        if self._streaming:
            gone, waiting = time.monotonic_ns(), list(Provider.waiting)
            Provider.waiting.clear()
            for other in waiting:
                other._tell(gone)

    def data_received(self, data: bytes) -> None:
        if self._left < 0 and not self._chunked:
            self._buffer += data
            head, found, data = self._buffer.partition(b"\r\n\r\n")
            if not found:
                return
            self._buffer = b""
            self._begin(head)
        if len(self._asked) < LOOKED_AT:
            self._asked += data[: LOOKED_AT - len(self._asked)]
        if self._chunked:
            self._buffer = (self._buffer + data)[-7:]
            if not self._buffer.endswith(b"\r\n0\r\n\r\n") and self._asked != b"0\r\n\r\n":
                return
        else:
            self._left -= len(data)
            if self._left > 0:
                return
        self._end()

    def _begin(self, head: bytes) -> None:
        length = _LENGTH.search(head)
        self._get = head.startswith((b"GET ", b"HEAD "))
        self._chunked = _CHUNKED.search(head) is not None
        self._left = int(length[1]) if length else 0
        self._asked = head.partition(b"\r\n")[0] if self._get else b""

    def _end(self) -> None:
        asked, self._asked, self._buffer = self._asked, b"", b""
        self._left, self._chunked = -1, False
        if self._get:
            if asked.startswith(b"GET /gone "):
                Provider.waiting.append(self)
            else:
                self._tell(Provider.first_ns if asked.startswith(b"GET /first ") else Provider.served)
            return
        Provider.served += 1
        Provider.first_ns = Provider.first_ns or time.monotonic_ns()
        every = _EVERY.search(asked, 0, 4096)
        self._every_s = int(every[1]) / 1000 if every else EVERY_S
        think = _THINK.search(asked, 0, 4096)
        go = self._stream if _STREAM.search(asked) else self._answer
        if think:
            self._timer = asyncio.get_running_loop().call_later(int(think[1]) / 1000, go)
        else:
            go()

    def _tell(self, number: int) -> None:
        body = b"%d" % number
        self.transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))

    def _answer(self) -> None:
        self.transport.write(ANSWER)

    def _stream(self) -> None:
        self._streaming = True
        self.transport.write(STREAM_HEAD + stamped(time.monotonic_ns()))
        self._next(1, asyncio.get_running_loop().time())

    def _next(self, number: int, begun: float) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_at(begun + number * self._every_s, self._send, number, begun)

    def _send(self, number: int, begun: float) -> None:
        if number < EVENTS:
            self.transport.write(stamped(time.monotonic_ns()))
            self._next(number + 1, begun)
        else:
            self._streaming = False
            self.transport.write(STREAM_END)


async def serve(port: int) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Provider, "127.0.0.1", port, backlog=1024)
    ready()
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1])))
