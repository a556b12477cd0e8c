"""An MCP server with the tool ``alpha``, and ``omega`` too once there is a file ``more`` in the directory ``argv[1]``.

It writes the methods that it is called by, and ``changed`` when it has told of its new tool, to ``log`` there.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

PLACE = Path(sys.argv[1])
MORE = PLACE / "more"


def note(word: str) -> None:
    with (PLACE / "log").open("a") as file:
        file.write(word + "\n")


def say(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps({"jsonrpc": "2.0", **message}) + "\n")
    sys.stdout.flush()


def watch() -> None:
    while not MORE.exists():
        time.sleep(0.02)
    say({"method": "notifications/tools/list_changed"})
    note("changed")


def answer(method: str, params: dict[str, Any]) -> dict[str, Any] | None:
    if method == "initialize":
        about = {"name": "probe", "version": "1"}
        version = params["protocolVersion"]
        return {"protocolVersion": version, "capabilities": {"tools": {"listChanged": True}}, "serverInfo": about}
    if method == "tools/list":
        schema = {"type": "object", "properties": {"x": {"type": "string"}}}
        names = ["alpha", *(["omega"] if MORE.exists() else [])]
        return {"tools": [{"name": name, "description": name, "inputSchema": schema} for name in names]}
    if method == "tools/call":
        return {"content": [{"type": "text", "text": f"called {params['name']}"}]}
    return {} if method == "ping" else None


def main() -> None:
    for line in sys.stdin:
        message = json.loads(line)
        note(message.get("method", "?"))
        if "id" not in message:
            if message.get("method") == "notifications/initialized":
                threading.Thread(target=watch, daemon=True).start()
            continue
        result = answer(message["method"], message.get("params") or {})
        error = {"code": -32601, "message": "no such method"}
        say({"id": message["id"], **({"error": error} if result is None else {"result": result})})


main()
