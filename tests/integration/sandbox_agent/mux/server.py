"""A small MCP server on stdio that does what its tools say, for good or ill. Standard library only::

python server.py '{"name": "one", "prompts": true, …}'
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

SETUP: dict[str, Any] = json.loads(sys.argv[1]) if __name__ == "__main__" else {}
TOOLS = [
    "echo", "wait", "release", "heard", "environment", "die", "add", "ask", "log", "big", "link", "flood",
    "twice", "garbage", "change", "silent", "progress", "bear",
]  # fmt: skip


def send(message: Any) -> None:
    data = json.dumps(message).encode() + b"\n"
    while data:
        data = data[os.write(1, data) :]


def notify(method: str, **params: Any) -> None:
    send({"jsonrpc": "2.0", "method": method, "params": params})


def pass_gate(name: str) -> None:
    """Reads the file or pipe of that name in the setup, if there is one."""
    if name in SETUP:
        with open(SETUP[name]) as gate:
            gate.read()


class Server:
    def __init__(self) -> None:
        self.tools = [f"{SETUP.get('prefix', '')}{name}" for name in TOOLS] + SETUP.get("tools", [])
        if "more" in SETUP:
            with open(SETUP["more"]) as more:
                self.tools += more.read().split()
        self.notes: list[Any] = []
        self.waiting: list[Any] = []
        self.asked: dict[str, Any] = {}
        self.hello: dict[str, Any] = {}

    def run(self) -> None:
        for line in sys.stdin.buffer:
            message = json.loads(line)
            if "method" not in message:
                self.answer(self.asked.pop(message["id"]), message.get("result", message.get("error")))
            elif "id" in message:
                self.request(message["id"], message["method"], message.get("params", {}))
            else:
                self.notes.append([message["method"], message.get("params")])

    def answer(self, request_id: Any, value: Any) -> None:
        content = [{"type": "text", "text": value if isinstance(value, str) else json.dumps(value)}]
        send({"jsonrpc": "2.0", "id": request_id, "result": {"content": content}})

    def request(self, request_id: Any, method: str, params: dict[str, Any]) -> None:
        self.notes.append([method, params])
        if method == "tools/call":
            name = params["name"].removeprefix(SETUP.get("prefix", ""))
            if name in TOOLS:
                getattr(self, name)(request_id, params.get("arguments", {}), params.get("_meta", {}))
            else:
                self.answer(request_id, f"{SETUP.get('name')} did {name}")
            return
        result = self.result(method, params)
        if result is None:
            send({"jsonrpc": "2.0", "id": request_id, "error": {"code": -32601, "message": f"no {method}"}})
        else:
            send({"jsonrpc": "2.0", "id": request_id, "result": result})

    def result(self, method: str, params: dict[str, Any]) -> Any:
        if method == "initialize":
            return self.initialize(params)
        if method == "tools/list":
            pass_gate("list_gate")
            return self.page(
                "tools", [{"name": n, "title": f"T {n}", "inputSchema": {"type": "object"}} for n in self.tools], params
            )
        if method == "prompts/list" and "prompts" in SETUP:
            return self.page("prompts", [{"name": name, "description": name} for name in SETUP["prompts"]], params)
        if method == "prompts/get":
            text = f"{SETUP.get('name')}: {params['name']} {params.get('arguments')}"
            return {"messages": [{"role": "user", "content": {"type": "text", "text": text}}]}
        if method == "resources/list" and "resources" in SETUP:
            return self.page("resources", [{"uri": uri, "name": uri} for uri in SETUP["resources"]], params)
        if method == "resources/templates/list" and "templates" in SETUP:
            return {"resourceTemplates": [{"uriTemplate": uri, "name": uri} for uri in SETUP["templates"]]}
        if method == "resources/read":
            return {"contents": [{"uri": params["uri"], "text": f"{SETUP.get('name')} has {params['uri']}"}]}
        if method == "completion/complete":
            return {"completion": {"values": [json.dumps(params["ref"], sort_keys=True)]}}
        if method in ("resources/subscribe", "resources/unsubscribe", "logging/setLevel"):
            return {}
        return None

    def initialize(self, params: dict[str, Any]) -> Any:
        self.hello = params
        pass_gate("gate")
        if "die_once" in SETUP and not os.path.exists(SETUP["die_once"]):
            with open(SETUP["die_once"], "w"):
                os._exit(4)
        if SETUP.get("hang"):
            return sys.stdin.read()
        if SETUP.get("refuse"):
            return None
        able: dict[str, Any] = {"tools": {"listChanged": True}, "logging": {}}
        if "prompts" in SETUP:
            able |= {"prompts": {"listChanged": True}, "completions": {}}
        if "resources" in SETUP or "templates" in SETUP:
            able["resources"] = {"subscribe": True}
        answer = {
            "protocolVersion": SETUP.get("version", params["protocolVersion"]),
            "capabilities": able,
            "serverInfo": {"name": "stand-in", "version": "1"},
        }
        return answer | ({"instructions": SETUP["instructions"]} if "instructions" in SETUP else {})

    def page(self, field: str, items: list[Any], params: dict[str, Any]) -> Any:
        size = SETUP.get("page", 1000)
        start = int(params.get("cursor", 0))
        more = {"nextCursor": str(start + size)} if start + size < len(items) else {}
        return {field: items[start : start + size]} | more

    # -- tools ----------------------------------------------------------------------------------

    def echo(self, request_id: Any, values: dict[str, Any], meta: dict[str, Any]) -> None:
        self.answer(request_id, {"name": SETUP.get("name"), "pid": os.getpid(), **values})

    def wait(self, request_id: Any, values: dict[str, Any], meta: dict[str, Any]) -> None:
        self.waiting.append(request_id)

    def release(self, request_id: Any, values: dict[str, Any], meta: dict[str, Any]) -> None:
        waiting, self.waiting = self.waiting, []
        for waiter in reversed(waiting):
            self.answer(waiter, f"released {waiter}")
        self.answer(request_id, "released all")

    def heard(self, request_id: Any, values: dict[str, Any], meta: dict[str, Any]) -> None:
        self.answer(request_id, self.notes)

    def silent(self, request_id: Any, values: dict[str, Any], meta: dict[str, Any]) -> None:
        """Never answers."""

    def environment(self, request_id: Any, values: dict[str, Any], meta: dict[str, Any]) -> None:
        group = os.getpgid(0) == os.getpid()
        state = {"env": dict(os.environ), "cwd": os.getcwd(), "leader": group, "hello": self.hello}
        self.answer(request_id, state)

    def bear(self, request_id: Any, values: dict[str, Any], meta: dict[str, Any]) -> None:
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            while True:
                signal.pause()
        self.answer(request_id, child)

    def die(self, request_id: Any, values: dict[str, Any], meta: dict[str, Any]) -> None:
        os.write(2, b"the last words\n")
        os._exit(3)

    def add(self, request_id: Any, values: dict[str, Any], meta: dict[str, Any]) -> None:
        self.tools.append(values["tool"])
        notify("notifications/tools/list_changed")
        self.answer(request_id, "added")

    def ask(self, request_id: Any, values: dict[str, Any], meta: dict[str, Any]) -> None:
        key = f"ask-{len(self.asked)}"
        self.asked[key] = request_id
        send({"jsonrpc": "2.0", "id": key, "method": values["method"], "params": values.get("params", {})})

    def log(self, request_id: Any, values: dict[str, Any], meta: dict[str, Any]) -> None:
        notify("notifications/message", level=values["level"], logger="inner", data=values["data"])
        self.answer(request_id, "logged")

    def progress(self, request_id: Any, values: dict[str, Any], meta: dict[str, Any]) -> None:
        for step in (1, 2):
            notify("notifications/progress", progressToken=meta["progressToken"], progress=step, total=2)
        self.answer(request_id, "done")

    def change(self, request_id: Any, values: dict[str, Any], meta: dict[str, Any]) -> None:
        notify("notifications/resources/updated", uri=values["uri"])
        self.answer(request_id, "changed")

    def big(self, request_id: Any, values: dict[str, Any], meta: dict[str, Any]) -> None:
        self.answer(request_id, "x" * values["size"])

    def link(self, request_id: Any, values: dict[str, Any], meta: dict[str, Any]) -> None:
        content = [{"type": "resource_link", "uri": values["uri"], "name": "it"}]
        send({"jsonrpc": "2.0", "id": request_id, "result": {"content": content}})

    def flood(self, request_id: Any, values: dict[str, Any], meta: dict[str, Any]) -> None:
        for number in range(values["count"]):
            notify("notifications/message", level="debug", data=number)
        self.answer(request_id, "flooded")

    def twice(self, request_id: Any, values: dict[str, Any], meta: dict[str, Any]) -> None:
        self.answer(request_id, "first")
        self.answer(request_id, "second")

    def garbage(self, request_id: Any, values: dict[str, Any], meta: dict[str, Any]) -> None:
        for line in (b"hello\n", b"[1, 2\n", b'{"jsonrpc": "2.0"}\n', b"\xff\xfe\n", b"42\n", b"[]\n") * values.get(
            "times", 1
        ):
            os.write(1, line)
        self.answer(request_id, "clean")


if __name__ == "__main__":
    if SETUP.get("stubborn"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if SETUP.get("die"):
        os.write(2, b"born dead\n")
        sys.exit(3)
    Server().run()
