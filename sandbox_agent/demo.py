"""The built-in demo agent: a small honest ACP agent (protocol version 1) on stdio. Standard library only.

It says what it is, echoes, runs shell commands and calls MCP tools, so that everything around an
agent can be tried with no key and no network. Threads, not asyncio: that starts 50 ms sooner.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

WORD_PAUSE_S = 0.01
SLOW_PAUSE_S = 0.05
OUTPUT_LIMIT = 16_384
COMMAND_TIMEOUT_S = 120.0
TOOL_TIMEOUT_S = 30.0
MAX_SLOW = 100_000
METHOD_NOT_FOUND, INVALID_PARAMS, INTERNAL = -32601, -32602, -32603
HELP = """I am Cortex's built-in demo agent; there is no model behind me. I echo what you write, and:
`!command` runs a shell command in the sandbox, `!ask command` asks for permission first,
`/slow N [MS]` streams N chunks, `/mcp` lists the MCP servers, `/tool NAME {json}` calls an MCP tool,
`/model TEXT` asks the model at $DEMO_MODEL_URL (Anthropic's API, such as {gateway}/anthropic)."""


class RpcError(Exception):
    """Becomes a JSON-RPC error."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Cancelled(Exception):
    """session/cancel came."""


class Session:
    """One conversation. ``cancel`` ends the turn that runs."""

    def __init__(self, key: str, cwd: str, servers: list[dict[str, Any]]) -> None:
        self.key = key
        self.cwd = cwd
        self.servers = servers
        self.cancel = threading.Event()
        self.busy = threading.Lock()
        self.history: list[tuple[str, str]] = []


class Peer:
    """The other end of stdio: answers, notifications and our own requests."""

    def __init__(self) -> None:
        self._write = threading.Lock()
        self._next = 0
        self._waiting: dict[int, tuple[threading.Event, list[dict[str, Any]]]] = {}

    def send(self, message: dict[str, Any]) -> None:
        data = json.dumps({"jsonrpc": "2.0", **message}, separators=(",", ":")).encode() + b"\n"
        with self._write:
            while data:
                data = data[os.write(1, data) :]

    def ask(self, method: str, params: dict[str, Any], cancel: threading.Event) -> dict[str, Any]:
        """Our request's answer. Raises ``Cancelled``."""
        with self._write:
            self._next += 1
            number = self._next
        done, answer = threading.Event(), []  # type: tuple[threading.Event, list[dict[str, Any]]]
        self._waiting[number] = (done, answer)
        self.send({"id": number, "method": method, "params": params})
        while not done.wait(0.05):
            if cancel.is_set():
                self._waiting.pop(number, None)
                raise Cancelled
        return answer[0]

    def answered(self, message: dict[str, Any]) -> None:
        done, answer = self._waiting.pop(message.get("id", 0), (None, None))
        if done is not None and answer is not None:
            answer.append(message)
            done.set()


class Demo:
    """Methods of the agent, by their ACP names."""

    def __init__(self) -> None:
        self._peer = Peer()
        self._sessions: dict[str, Session] = {}
        self._tools = 0
        self._methods: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "initialize": self._initialize,
            "authenticate": lambda _: {},
            "session/new": self._new,
            "session/load": self._load,
            "session/prompt": self._prompt,
        }

    def run(self) -> None:
        """Until standard input ends."""
        for line in sys.stdin.buffer:
            try:
                message = json.loads(line)
            except ValueError:
                continue
            if not isinstance(message, dict):
                continue
            if "method" not in message:
                self._peer.answered(message)
            elif message["method"] == "session/cancel":
                session = self._sessions.get(_params(message).get("sessionId", ""))
                if session is not None:
                    session.cancel.set()
            elif message.get("method") == "session/prompt":
                threading.Thread(target=self._answer, args=(message,), daemon=True).start()
            elif "id" in message:
                self._answer(message)

    def _answer(self, message: dict[str, Any]) -> None:
        try:
            method = self._methods.get(message["method"])
            if method is None:
                raise RpcError(METHOD_NOT_FOUND, f"the demo agent has no {message['method']}")
            body: dict[str, Any] = {"result": method(_params(message))}
        except RpcError as error:
            body = {"error": {"code": error.code, "message": str(error)}}
        except (KeyError, TypeError, AttributeError) as error:
            body = {"error": {"code": INVALID_PARAMS, "message": f"bad parameters: {error}"}}
        except (OSError, ValueError) as error:
            body = {"error": {"code": INTERNAL, "message": str(error)}}
        self._peer.send({"id": message.get("id"), **body})

    def _initialize(self, params: dict[str, Any]) -> dict[str, Any]:
        return {
            "protocolVersion": 1,
            "agentCapabilities": {
                "loadSession": True,
                "promptCapabilities": {"image": False, "audio": False, "embeddedContext": True},
                "mcpCapabilities": {"http": False, "sse": False},
            },
            "agentInfo": {"name": "cortex-demo", "title": "Cortex demo agent", "version": "1"},
            "authMethods": [],
        }

    def _new(self, params: dict[str, Any]) -> dict[str, Any]:
        key = f"demo-{os.urandom(8).hex()}"
        self._sessions[key] = Session(key, params["cwd"], params.get("mcpServers") or [])
        return {"sessionId": key}

    def _load(self, params: dict[str, Any]) -> dict[str, Any]:
        key = params["sessionId"]
        session = self._sessions.get(key)
        if session is None:
            session = Session(key, params["cwd"], [])
            session.history = _stored(key)
        session.servers = params.get("mcpServers") or []
        self._sessions[key] = session
        for who, text in session.history:
            self._update(session, {"sessionUpdate": f"{who}_message_chunk", "content": {"type": "text", "text": text}})
        return {}

    # -- a turn ---------------------------------------------------------------------------------

    def _prompt(self, params: dict[str, Any]) -> dict[str, Any]:
        session = self._sessions.get(params["sessionId"])
        if session is None:
            raise RpcError(INVALID_PARAMS, f"unknown session {params['sessionId']}")
        text = "".join(block.get("text", "") for block in params["prompt"] if block.get("type") == "text").strip()
        with session.busy:
            session.cancel.clear()
            said: list[str] = []
            try:
                for chunk in self._reply(session, text):
                    said.append(chunk)
                    self._say(session, chunk)
                reason = "end_turn"
            except Cancelled:
                reason = "cancelled"
            session.history += [("user", text), ("agent", "".join(said))]
            _store(session.key, session.history)
        return {"stopReason": reason}

    def _reply(self, session: Session, text: str) -> Iterator[str]:
        if text.startswith("!ask "):
            yield self._command(session, text[5:].strip(), ask=True)
        elif text.startswith("!"):
            yield self._command(session, text[1:].strip(), ask=False)
        elif text.startswith("/slow"):
            yield from _slow(session, text.split()[1:])
        elif text == "/mcp":
            names = ", ".join(str(server.get("name")) for server in session.servers)
            yield f"MCP servers: {names}" if names else "There are no MCP servers."
        elif text.startswith("/model "):
            yield from _model(session, text[7:].strip())
        elif text.startswith("/tool "):
            yield self._tool(session, text[6:].strip())
        else:
            reply = HELP if text in ("", "/help", "help") else f"{HELP.partition(';')[0]}. You said: {text}"
            for number, word in enumerate(reply.split(" ")):
                if session.cancel.wait(WORD_PAUSE_S if number else 0):
                    raise Cancelled
                yield word if number == 0 else f" {word}"

    def _command(self, session: Session, command: str, *, ask: bool) -> str:
        call = self._tool_call(session, command, "execute", {"command": command})
        if ask and not self._permitted(session, call, command):
            self._tool_done(session, call, "failed", "not permitted")
            return "You did not permit it."
        self._tool_done(session, call, "in_progress", "")
        code, output = _shell(command, session)
        self._tool_done(session, call, "completed" if code == 0 else "failed", output)
        return f"{output}\n(exit code {code})" if code else output or "(no output)"

    def _permitted(self, session: Session, call: str, title: str) -> bool:
        options = [
            {"optionId": "allow", "name": "Allow", "kind": "allow_once"},
            {"optionId": "reject", "name": "Reject", "kind": "reject_once"},
        ]
        params = {
            "sessionId": session.key,
            "toolCall": {"toolCallId": call, "title": title, "kind": "execute", "status": "pending"},
            "options": options,
        }
        answer = self._peer.ask("session/request_permission", params, session.cancel)
        outcome = (answer.get("result") or {}).get("outcome") or {}
        if outcome.get("outcome") == "cancelled":
            raise Cancelled
        return bool(outcome.get("optionId") == "allow")

    def _tool(self, session: Session, text: str) -> str:
        name, _, arguments = text.partition(" ")
        try:
            values = json.loads(arguments or "{}")
        except ValueError as error:
            return f"These are not JSON arguments: {error}"
        call = self._tool_call(session, name, "other", values)
        broken = []
        for server in session.servers:
            if "command" not in server:
                continue
            try:
                with McpServer(server) as mcp:
                    if name in mcp.tools():
                        result = mcp.call(name, values)
                        self._tool_done(session, call, "failed" if result.get("isError") else "completed", "")
                        return "".join(part.get("text", "") for part in result.get("content", []))
            except (OSError, ValueError, RpcError) as error:
                broken.append(f" {server.get('name')} does not work: {error}.")
        self._tool_done(session, call, "failed", "no such tool")
        return f"No MCP server has a tool {name!r}.{''.join(broken)}"

    def _tool_call(self, session: Session, title: str, kind: str, given: Any) -> str:
        self._tools += 1
        call = f"call-{self._tools}"
        update = {"sessionUpdate": "tool_call", "toolCallId": call, "title": title, "kind": kind}
        self._update(session, update | {"status": "pending", "rawInput": given})
        return call

    def _tool_done(self, session: Session, call: str, status: str, text: str) -> None:
        update: dict[str, Any] = {"sessionUpdate": "tool_call_update", "toolCallId": call, "status": status}
        if text:
            update["content"] = [{"type": "content", "content": {"type": "text", "text": text}}]
        self._update(session, update)

    def _say(self, session: Session, text: str) -> None:
        update = {"sessionUpdate": "agent_message_chunk", "content": {"type": "text", "text": text}}
        self._update(session, update)

    def _update(self, session: Session, update: dict[str, Any]) -> None:
        self._peer.send({"method": "session/update", "params": {"sessionId": session.key, "update": update}})


def _params(message: dict[str, Any]) -> dict[str, Any]:
    params = message.get("params")
    return params if isinstance(params, dict) else {}


def _slow(session: Session, arguments: list[str]) -> Iterator[str]:
    count = min(int(arguments[0]), MAX_SLOW) if arguments and arguments[0].isdigit() else 20
    pause = int(arguments[1]) / 1000 if len(arguments) > 1 and arguments[1].isdigit() else SLOW_PAUSE_S
    for number in range(count):
        if session.cancel.wait(pause if number else 0):
            raise Cancelled
        yield f"{number + 1} "


def _model(session: Session, text: str) -> Iterator[str]:
    """What a model says, as it comes: text deltas of a streamed ``/v1/messages``, over plain HTTP."""
    import socket

    host, _, path = os.environ.get("DEMO_MODEL_URL", "").removeprefix("http://").partition("/")
    name, _, port = host.partition(":")
    if not name:
        yield "DEMO_MODEL_URL is not set; give it to [agents.demo.env] in config.toml."
        return
    message = {"role": "user", "content": text}
    asked = {"model": "demo", "max_tokens": 1024, "stream": True, "messages": [message]}
    body = json.dumps(asked).encode()
    head = f"POST /{path}/v1/messages HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n"
    head += "Content-Type: application/json\r\nanthropic-version: 2023-06-01\r\nConnection: close\r\n\r\n"
    try:
        with socket.create_connection((name, int(port or 80)), timeout=COMMAND_TIMEOUT_S) as sock:
            sock.sendall(head.encode() + body)
            with sock.makefile("rb") as answer:
                status = answer.readline().decode(errors="replace").strip()
                chunked = False
                while (field := answer.readline().strip().lower()) != b"":
                    chunked = chunked or (field.startswith(b"transfer-encoding:") and b"chunked" in field)
                if " 200 " not in f"{status} ":
                    yield f"The model's answer was {status}: {answer.read(OUTPUT_LIMIT).decode(errors='replace')}"
                    return
                for line in _lines(answer, chunked):
                    if session.cancel.is_set():
                        raise Cancelled
                    event = json.loads(line[5:]) if line.startswith(b"data:") else {}
                    if event.get("type") == "content_block_delta":
                        yield str(event.get("delta", {}).get("text", ""))
    except (OSError, ValueError) as error:
        yield f"The model cannot be asked: {error}"


def _lines(answer: BinaryIO, chunked: bool) -> Iterator[bytes]:
    """The lines of an HTTP body (RFC 9112 section 7.1), each as soon as it is whole."""
    if not chunked:
        yield from answer
        return
    line = b""
    while size := int(answer.readline().partition(b";")[0] or b"0", 16):
        *whole, line = (line + answer.read(size)).split(b"\n")
        yield from whole
        answer.readline()
    yield line


def _shell(command: str, session: Session) -> tuple[int, str]:
    """Runs ``command``; exit code and output, cut at ``OUTPUT_LIMIT``. Raises ``Cancelled``."""
    import subprocess
    import tempfile
    import time

    cwd = session.cwd if os.path.isdir(session.cwd) else os.path.expanduser("~")
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            ["/bin/sh", "-c", command], cwd=cwd, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip
        end = time.monotonic() + COMMAND_TIMEOUT_S
        while True:
            try:
                process.wait(0.02)
                break
            except subprocess.TimeoutExpired:
                if session.cancel.is_set() or time.monotonic() > end:
                    os.killpg(process.pid, 9)
                    process.wait()
                    if session.cancel.is_set():
                        raise Cancelled from None
                    return 124, f"stopped after {COMMAND_TIMEOUT_S:.0f} s"
        output.seek(0)
        return process.returncode, output.read(OUTPUT_LIMIT).decode(errors="replace").rstrip()


class McpServer:
    """An MCP server on stdio, run for one call."""

    def __init__(self, server: dict[str, Any]) -> None:
        import subprocess

        env = os.environ | {item["name"]: item["value"] for item in server.get("env") or []}
        self._number = 0
        self._process = subprocess.Popen(
            [server["command"], *server.get("args", [])],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._timer = threading.Timer(TOOL_TIMEOUT_S, self._process.kill)

    def __enter__(self) -> McpServer:
        self._timer.start()
        info = {"name": "cortex-demo", "version": "1"}
        try:
            self._ask("initialize", {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": info})
            self._send({"method": "notifications/initialized"})
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        self._process.kill()
        self._process.communicate()

    def tools(self) -> list[str]:
        return [tool["name"] for tool in self._ask("tools/list", {}).get("tools", [])]

    def call(self, name: str, arguments: Any) -> dict[str, Any]:
        return self._ask("tools/call", {"name": name, "arguments": arguments})

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"jsonrpc": "2.0", **message}).encode() + b"\n")
        self._process.stdin.flush()

    def _ask(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        self._number += 1
        self._send({"id": self._number, "method": method, "params": params})
        assert self._process.stdout is not None
        for line in self._process.stdout:
            message = json.loads(line)
            if message.get("id") == self._number and "method" not in message:
                if "error" in message:
                    return {"isError": True, "content": [{"text": str(message["error"].get("message"))}]}
                result: dict[str, Any] = message.get("result") or {}
                return result
        raise RpcError(INTERNAL, "the MCP server ended or did not answer")


def _store_path(key: str) -> str:
    if not key.startswith("demo-") or not key[5:].isalnum():
        raise RpcError(INVALID_PARAMS, f"unknown session {key}")
    return os.path.join(os.path.expanduser("~"), ".cortex-demo", f"{key}.json")


def _store(key: str, history: list[tuple[str, str]]) -> None:
    path = _store_path(key)
    try:
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        with open(f"{path}.new", "w") as file:
            json.dump(history, file)
        os.replace(f"{path}.new", path)
    except OSError as error:
        sys.stderr.write(f"demo agent: history not kept: {error}\n")


def _stored(key: str) -> list[tuple[str, str]]:
    try:
        with open(_store_path(key)) as file:
            return [(str(who), str(text)) for who, text in json.load(file)]
    except FileNotFoundError:
        raise RpcError(INVALID_PARAMS, f"unknown session {key}") from None


if __name__ == "__main__":
    try:
        Demo().run()
    except KeyboardInterrupt:
        sys.exit(130)
