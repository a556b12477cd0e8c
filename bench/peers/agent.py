"""An ACP agent for benchmarks: ``tokens COUNT PAUSE_US`` streams that many updates, each with the time it was sent.

Standard library only, one thread; protocol version 1 on stdio. The time is CLOCK_MONOTONIC, which
all processes of a machine share.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

FILL = "x" * 40


def send(message: dict[str, Any]) -> None:
    _write(json.dumps({"jsonrpc": "2.0", **message}, separators=(",", ":")).encode() + b"\n")


def _write(data: bytes) -> None:
    while data:
        data = data[os.write(1, data) :]


def stream(session: str, count: int, pause_us: int) -> None:
    head, tail = json.dumps(
        {
            "jsonrpc": "2.0",
            "method": "session/update",
            "params": {
                "sessionId": session,
                "update": {"sessionUpdate": "agent_message_chunk", "content": {"type": "text", "text": "@"}},
            },
        },
        separators=(",", ":"),
    ).split("@")
    due = time.monotonic()
    for _ in range(count):
        if pause_us:
            due += pause_us / 1e6
            time.sleep(max(0.0, due - time.monotonic()))
        _write(f"{head}at={time.monotonic_ns()};{FILL}{tail}\n".encode())


def answer(method: str, params: dict[str, Any], sessions: list[str]) -> dict[str, Any]:
    """The result of a request."""
    if method == "initialize":
        return {"protocolVersion": 1, "agentCapabilities": {"loadSession": True}, "authMethods": []}
    if method == "session/new":
        sessions.append(f"bench-{len(sessions)}")
        return {"sessionId": sessions[-1]}
    if method == "session/prompt":
        words = params["prompt"][0]["text"].split()
        if words[0] == "tokens":
            stream(params["sessionId"], int(words[1]), int(words[2]))
        return {"stopReason": "end_turn"}
    return {}


def main() -> None:
    sessions: list[str] = []
    for line in sys.stdin.buffer:
        message = json.loads(line)
        if "id" in message and "method" in message:
            result = answer(message["method"], message.get("params") or {}, sessions)
            send({"id": message["id"], "result": result})


if __name__ == "__main__":
    main()
