from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox_agent import demo

MCP_SERVER = """
import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if "id" not in message:
        continue
    print(json.dumps({"jsonrpc": "2.0", "method": "notifications/message", "params": {}}), flush=True)
    results = {
        "initialize": {"protocolVersion": "2025-06-18", "capabilities": {"tools": {}}, "serverInfo": {}},
        "tools/list": {"tools": [{"name": "add", "inputSchema": {"type": "object"}}]},
    }
    result = results.get(message["method"])
    if result is None:
        given = message["params"]["arguments"]
        result = {"content": [{"type": "text", "text": str(given["a"] + given["b"])}]}
    print(json.dumps({"jsonrpc": "2.0", "id": message["id"], "result": result}), flush=True)
"""


class Agent:
    """The demo agent as a process; a client that speaks lines."""

    def __init__(self, home: Path, **env: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", demo.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={"PATH": os.environ["PATH"], "HOME": str(home)} | env,
            cwd="/",
        )
        self._number = 0

    def send(self, **message: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"jsonrpc": "2.0", **message}).encode() + b"\n")
        self.process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        message: dict[str, Any] = json.loads(self.process.stdout.readline())
        assert message["jsonrpc"] == "2.0"
        return message

    def start(self, method: str, **params: Any) -> int:
        self._number += 1
        self.send(id=self._number, method=method, params=params)
        return self._number

    def finish(self, number: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The answer to request ``number`` and the updates that came before it."""
        updates = []
        while (message := self.receive()).get("id") != number:
            updates.append(message["params"]["update"])
        return message, updates

    def call(self, method: str, **params: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        return self.finish(self.start(method, **params))

    def session(self, cwd: Path, servers: list[dict[str, Any]] | None = None) -> str:
        answer, _ = self.call("session/new", cwd=str(cwd), mcpServers=servers or [])
        key: str = answer["result"]["sessionId"]
        return key

    def prompt(self, session: str, text: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        return self.call("session/prompt", sessionId=session, prompt=[{"type": "text", "text": text}])

    def close(self) -> None:
        self.process.communicate(timeout=5)


def said(updates: list[dict[str, Any]], kind: str = "agent_message_chunk") -> list[str]:
    return [update["content"]["text"] for update in updates if update["sessionUpdate"] == kind]


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    made = Agent(tmp_path)
    yield made
    made.close()


def test_it_says_what_it_is_and_streams_its_echo_word_by_word(agent: Agent, tmp_path: Path) -> None:
    answer, _ = agent.call("initialize", protocolVersion=1, clientCapabilities={})
    assert answer["result"]["protocolVersion"] == 1
    assert answer["result"]["agentCapabilities"]["loadSession"] is True
    answer, updates = agent.prompt(agent.session(tmp_path), "two words")
    assert answer["result"] == {"stopReason": "end_turn"}
    assert len(said(updates)) > 5
    text = "".join(said(updates))
    assert "demo agent" in text
    assert text.endswith("You said: two words")


def test_a_command_runs_and_is_shown_as_a_tool_call(agent: Agent, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    session = agent.session(work)
    _, updates = agent.prompt(session, "!pwd; exit 3")
    kinds = [(update["sessionUpdate"], update.get("status")) for update in updates]
    assert kinds[:3] == [("tool_call", "pending"), ("tool_call_update", "in_progress"), ("tool_call_update", "failed")]
    assert "".join(said(updates)) == f"{work}\n(exit code 3)"


@pytest.mark.parametrize(("outcome", "ran"), [("allow", True), ("reject", False)])
def test_permission_is_asked_for_and_honoured(agent: Agent, tmp_path: Path, outcome: str, ran: bool) -> None:
    number = agent.start(
        "session/prompt", sessionId=agent.session(tmp_path), prompt=[{"type": "text", "text": "!ask touch made"}]
    )
    agent.receive()
    request = agent.receive()
    assert request["method"] == "session/request_permission"
    assert {option["optionId"] for option in request["params"]["options"]} == {"allow", "reject"}
    agent.send(id=request["id"], result={"outcome": {"outcome": "selected", "optionId": outcome}})
    answer, _ = agent.finish(number)
    assert answer["result"]["stopReason"] == "end_turn"
    assert (tmp_path / "made").exists() is ran


@pytest.mark.parametrize("prompt", ["/slow 1000", "!sleep 60", "!ask true"])
def test_cancel_ends_whatever_runs(agent: Agent, tmp_path: Path, prompt: str) -> None:
    session = agent.session(tmp_path)
    number = agent.start("session/prompt", sessionId=session, prompt=[{"type": "text", "text": prompt}])
    agent.receive()
    agent.send(method="session/cancel", params={"sessionId": session})
    while (message := agent.receive()).get("id") != number or "method" in message:
        pass
    assert message["result"] == {"stopReason": "cancelled"}
    answer, _ = agent.prompt(session, "/slow 1")
    assert answer["result"]["stopReason"] == "end_turn"


def test_a_conversation_outlives_the_process(agent: Agent, tmp_path: Path) -> None:
    session = agent.session(tmp_path)
    agent.prompt(session, "/slow 2 0")
    later = Agent(tmp_path)
    answer, updates = later.call("session/load", sessionId=session, cwd=str(tmp_path), mcpServers=[])
    assert answer["result"] == {}
    assert said(updates, "user_message_chunk") == ["/slow 2 0"]
    assert said(updates) == ["1 2 "]
    later.close()


def test_mcp_servers_are_listed_and_a_tool_is_called(agent: Agent, tmp_path: Path) -> None:
    script = tmp_path / "server.py"
    script.write_text(MCP_SERVER)
    server = {"name": "sums", "command": sys.executable, "args": [str(script)], "env": []}
    session = agent.session(tmp_path, [server])
    assert said(agent.prompt(session, "/mcp")[1]) == ["MCP servers: sums"]
    assert said(agent.prompt(session, '/tool add {"a": 40, "b": 2}')[1]) == ["42"]
    assert "No MCP server" in said(agent.prompt(session, "/tool multiply {}")[1])[0]


def test_a_broken_mcp_server_ends_no_turn_and_hides_no_other(agent: Agent, tmp_path: Path) -> None:
    script = tmp_path / "server.py"
    script.write_text(MCP_SERVER)
    broken: list[dict[str, Any]] = [
        {"name": "gone", "command": "/no/such"},
        {"name": "mute", "command": "/bin/true"},
        {"name": "chatty", "command": "/bin/echo", "args": ["hello"]},
    ]
    session = agent.session(tmp_path, broken)
    (reply,) = said(agent.prompt(session, "/tool add {}")[1])
    assert reply.startswith("No MCP server has a tool 'add'. gone does not work: ")
    assert "mute does not work: " in reply
    assert "chatty does not work: " in reply
    session = agent.session(tmp_path, [*broken, {"name": "sums", "command": sys.executable, "args": [str(script)]}])
    assert said(agent.prompt(session, '/tool add {"a": 40, "b": 2}')[1]) == ["42"]


def test_errors_are_json_rpc_errors_and_garbage_is_passed_over(agent: Agent, tmp_path: Path) -> None:
    assert agent.process.stdin is not None
    agent.process.stdin.write(b"\xff\x00 not json\n[]\n17\n")
    assert agent.call("no/such")[0]["error"]["code"] == demo.METHOD_NOT_FOUND
    assert agent.call("session/new")[0]["error"]["code"] == demo.INVALID_PARAMS
    assert agent.prompt("demo-unknown", "x")[0]["error"]["code"] == demo.INVALID_PARAMS
    hostile = agent.call("session/load", sessionId="demo-../../etc/passwd", cwd="/")[0]
    assert hostile["error"]["code"] == demo.INVALID_PARAMS
    assert agent.session(tmp_path)


class Model(http.server.BaseHTTPRequestHandler):
    """Streams what it was asked, as Anthropic's API does, in chunks that end anywhere."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = asked["messages"][0]["content"]
        self.send_response(200 if text != "no" else 529, "overloaded")
        chunked = text != "plain"
        if chunked:
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        body = b""
        for word in ("you", " asked ", text):
            delta = {"type": "content_block_delta", "delta": {"type": "text_delta", "text": word}}
            body += f"event: content_block_delta\ndata: {json.dumps(delta)}\n\n".encode()
        if chunked:
            for at in range(0, len(body), 7):
                piece = body[at : at + 7]
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            body = b"0\r\n\r\n"
        self.wfile.write(body)
        self.close_connection = True

    def log_message(self, *args: object) -> None:
        return


@pytest.mark.parametrize(
    ("text", "answer"),
    [("why", "you asked why"), ("plain", "you asked plain"), ("no", "The model's answer was HTTP/1.1 529")],
)
def test_it_asks_a_model_where_it_is_told_of_one(tmp_path: Path, text: str, answer: str) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Model) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        told = Agent(tmp_path, DEMO_MODEL_URL=f"http://127.0.0.1:{server.server_port}/anthropic")
        try:
            _, updates = told.prompt(told.session(tmp_path), f"/model {text}")
            assert "".join(said(updates)).startswith(answer)
        finally:
            told.process.kill()
            told.process.communicate()
            server.shutdown()


def test_it_says_that_there_is_no_model(agent: Agent, tmp_path: Path) -> None:
    _, updates = agent.prompt(agent.session(tmp_path), "/model why")
    assert "DEMO_MODEL_URL" in "".join(said(updates))
