"""Whatever a client does, what it gets is ACP version 1 as the PyPI package agent-client-protocol knows it."""

from __future__ import annotations

from typing import Any

from acp import schema
from pydantic import BaseModel

from tests.unit.sandbox_agent.acp.kit import Agent, Bench, Message, Peer

LOAD = {"cwd": "/", "mcpServers": []}
RESULTS: dict[str, type[BaseModel]] = {
    "initialize": schema.InitializeResponse,
    "session/new": schema.NewSessionResponse,
    "session/load": schema.LoadSessionResponse,
    "session/resume": schema.ResumeSessionResponse,
    "session/list": schema.ListSessionsResponse,
    "session/prompt": schema.PromptResponse,
    "session/set_mode": schema.SetSessionModeResponse,
    "session/close": schema.CloseSessionResponse,
}
CALLS: dict[str, type[BaseModel]] = {
    "session/update": schema.SessionNotification,
    "session/request_permission": schema.RequestPermissionRequest,
    "$/cancel_request": schema.CancelRequestNotification,
}
BLOCKS: list[Any] = [
    {"type": "text", "text": "look"},
    {"type": "image", "data": "aGk=", "mimeType": "image/png"},
    {"type": "resource_link", "name": "n", "uri": "file:///n"},
    {"type": "resource", "resource": {"uri": "file:///n", "text": "t"}},
    {"type": "resource", "resource": {"what": "no uri"}},
    {"type": "text"},
    {"type": "new", "text": "unheard of"},
    {},
]


class Checked:
    """Asks, and notes which method each answer is for."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.asked: dict[Any, str] = {}

    async def ask(self, method: str, params: Message) -> Any:
        request = await self.peer.ask(method, params, f"r{len(self.asked)}")
        self.asked[request] = method
        return request

    async def request(self, method: str, params: Message) -> Message:
        return await self.peer.answer_to(await self.ask(method, params))

    def check(self) -> set[str]:
        """Validates all that came; returns the methods that were seen."""
        seen = set()
        for message in self.peer.everything:
            assert message["jsonrpc"] == "2.0"
            if "method" in message:
                CALLS[message["method"]].model_validate(message["params"])
                seen.add(message["method"])
            elif "error" in message:
                schema.Error.model_validate(message["error"])
                assert message["error"]["data"]["cortex"]["seq"] > 0
            else:
                method = self.asked[message["id"]]
                RESULTS[method].model_validate(message["result"])
                assert message["result"]["_meta"]["cortex"]["seq"] > 0
                seen.add(method)
        return seen


async def test_a_client_that_knows_nothing_of_cortex_gets_plain_acp(bench: Bench) -> None:
    bench.start()
    bench.agent.on["session/set_mode"] = lambda params: None
    one, two = Checked(bench.connect()), Checked(bench.connect())
    for client in (one, two):
        await client.request("initialize", {"protocolVersion": 1, "clientCapabilities": {}})
    session = (await one.request("session/new", LOAD))["result"]["sessionId"]
    await two.request("session/resume", {"sessionId": session, "cwd": "/"})
    turn = await one.ask("session/prompt", {"sessionId": session, "prompt": BLOCKS})
    assert (await bench.agent.asked("session/prompt"))["params"]["prompt"] == BLOCKS
    bench.agent.update(session, "thinking", "agent_thought_chunk")
    options = [{"optionId": "y", "name": "Yes", "kind": "allow_once"}]
    params = {"sessionId": session, "toolCall": {"toolCallId": "t"}, "options": options}
    bench.agent.say({"id": 1, "method": "session/request_permission", "params": params})
    question = await two.peer.until(lambda m: m.get("method") == "session/request_permission")
    yes = {"outcome": {"outcome": "selected", "optionId": "y"}}
    await two.peer.send({"id": question["id"], "result": yes})
    await one.peer.until(lambda m: m.get("method") == "$/cancel_request")
    bench.agent.answer("session/prompt", {"stopReason": "end_turn"})
    await one.peer.answer_to(turn)
    mode = await one.ask("session/set_mode", {"sessionId": session, "modeId": "code"})
    await bench.agent.asked("session/set_mode")
    bench.agent.answer("session/set_mode", None)
    await one.peer.answer_to(mode)
    await one.request("session/prompt", {"sessionId": "nope", "prompt": []})
    lost = await one.ask("session/prompt", {"sessionId": session, "prompt": BLOCKS[:1]})
    await bench.agent.asked("session/prompt", 2)
    bench.restart_agent(Agent())
    await one.peer.answer_to(lost)
    await two.request("session/load", {"sessionId": session, **LOAD})
    await two.request("session/list", {})
    await one.peer.send_text("[]")
    await one.request("session/close", {"sessionId": session})
    seen = one.check() | two.check()
    assert seen == {*RESULTS, *CALLS}
