"""Whatever clients and servers say, in whatever order: nothing is raised, each request is answered at most once,
and every one that nobody else has to answer is answered."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox_agent.jsonrpc import Message
from sandbox_agent.mcp_protocol import BY_METHOD, Listing
from sandbox_agent.mcp_server import Server
from sandbox_agent.mcp_spec import ServerSpec
from sandbox_agent.mux import Mux
from sandbox_agent.mux_client import Client

METHODS = [
    *BY_METHOD, "initialize", "ping", "tools/call", "prompts/get", "resources/read", "resources/subscribe",
    "resources/unsubscribe", "completion/complete", "logging/setLevel", "server/discover", "roots/list",
    "sampling/createMessage", "elicitation/create", "notifications/initialized", "notifications/cancelled",
    "notifications/progress", "notifications/message", "notifications/resources/updated",
    "notifications/roots/list_changed", "notifications/tools/list_changed", "notifications/x/list_changed",
    "notifications/elicitation/complete", "",
]  # fmt: skip
WORDS = st.sampled_from(
    ["s__t", "s__p", "s__", "t", "mem://a", "cortex:s:mem://a", "tpl://x", "debug", "error", "", "1"]
)
LEAVES = st.none() | st.booleans() | st.integers(0, 9) | WORDS
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(WORDS, inner, max_size=2), max_leaves=4
)
PARAMS: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {},
    optional={
        "name": VALUES,
        "uri": VALUES,
        "level": VALUES,
        "ref": VALUES | st.fixed_dictionaries({"type": WORDS | st.just("ref/prompt"), "name": WORDS, "uri": WORDS}),
        "cursor": VALUES,
        "capabilities": VALUES | st.just({"roots": {}, "sampling": {}, "elicitation": {}}),
        "protocolVersion": VALUES,
        "requestId": VALUES,
        "progressToken": VALUES,
        "_meta": VALUES | st.fixed_dictionaries({"progressToken": LEAVES}),
        "arguments": VALUES,
        "logger": VALUES,
    },
)
IDS = st.none() | st.integers(0, 6) | st.sampled_from(["1", "x"])
RESULTS = st.fixed_dictionaries(
    {},
    optional={
        "content": VALUES
        | st.just([{"type": "resource_link", "uri": "mem://b"}, {"type": "resource", "resource": {}}]),
        "messages": VALUES | st.just([{"content": {"type": "resource", "resource": {"uri": "mem://a"}}}]),
        "contents": VALUES | st.just([{"uri": "mem://a"}]),
    },
)
SAID = (
    st.fixed_dictionaries({"method": st.sampled_from(METHODS), "id": IDS}, optional={"params": PARAMS | VALUES})
    | st.fixed_dictionaries({"method": st.sampled_from(METHODS)}, optional={"params": PARAMS | VALUES})
    | st.fixed_dictionaries({"id": IDS, "result": RESULTS | VALUES})
    | st.fixed_dictionaries({"id": IDS, "error": VALUES})
    | VALUES
)


class Wire(asyncio.Transport):
    """Takes what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[Message] = []

    def write(self, data: Any) -> None:
        self.sent += [json.loads(line) for line in bytes(data).splitlines()]

    def is_closing(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0

    def abort(self) -> None:
        pass


class Process:
    """A server's process that does nothing."""

    pid = 1
    over = ""

    def __init__(self) -> None:
        self.sent: list[Message] = []

    def send(self, message: Message) -> None:
        self.sent.append(message)


LISTS: dict[str, Any] = {
    "tools": [{"name": "t"}],
    "prompts": [{"name": "p"}],
    "resources": [{"uri": "mem://a"}],
    "templates": [{"uriTemplate": "tpl://{x}"}],
}
ABLE: dict[str, Any] = {name: {} for name in ("tools", "prompts", "logging", "completions")}


def world(place: Path) -> tuple[Mux, Server, Process, list[tuple[Client, Wire]]]:
    """A multiplexer with one server that is up and two clients."""
    mux = Mux(str(place), dict, lambda: "/", lambda: None, lambda: None)
    server = Server(ServerSpec("s", "x"), mux, Listing({**ABLE, "resources": {"subscribe": True}}, "", LISTS))
    process = Process()
    server.state, server._process = "up", process  # type: ignore[assignment]
    mux._board.servers["s"] = server
    mux._board.changed()
    clients = [(Client(mux), Wire()) for _ in range(2)]
    for client, wire in clients:
        client.connection_made(wire)
    return mux, server, process, clients


def twice(messages: list[Message]) -> list[Any]:
    """Ids that were answered more than once; null is nobody's."""
    ids = [message["id"] for message in messages if "method" not in message and message["id"] is not None]
    return [each for each in set(ids) if ids.count(each) > 1]


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), SAID), max_size=14))
def test_nonsense_of_all_sides_breaks_nothing(said: list[tuple[int, Any]]) -> None:
    async def run() -> None:
        _, server, process, clients = world(Path("/nowhere"))
        asked: list[set[Any]] = [set(), set()]
        for who, message in said:
            if isinstance(message, dict) and "method" in message and message.get("id") is not None and who < 2:
                if message["id"] in asked[who]:
                    continue
                asked[who].add(message["id"])
            if who < 2:
                clients[who][0].data_received(json.dumps(message).encode() + b"\n")
            else:
                hear(server, message)
        for (client, wire), ids in zip(clients, asked, strict=True):
            assert twice(wire.sent) == []
            answered = {message["id"] for message in wire.sent if "method" not in message}
            assert set(client.asking) <= ids
            assert not answered & set(client.asking), "what is under way is not answered yet"
        for client, _ in clients:
            client.connection_lost(None)
        assert not server.open or all(not client.asking for client, _ in clients)
        assert all(isinstance(message, dict) for message in process.sent)
        server.lost("over")

    asyncio.run(run())


def hear(server: Server, message: Any) -> None:
    """As ``ServerProcess`` lets a server hear."""
    from sandbox_agent import jsonrpc

    try:
        kind = jsonrpc.kind(message)
    except ValueError:
        return
    server._heard(kind, message)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(METHODS), PARAMS), min_size=1, max_size=10))
def test_every_request_is_answered_once_its_server_is(said: list[tuple[str, dict[str, Any]]]) -> None:
    async def run() -> None:
        _, server, _, ((client, wire), _) = world(Path("/nowhere"))
        for number, (method, params) in enumerate(said):
            message = {"jsonrpc": "2.0", "id": number, "method": method, "params": params}
            client.data_received(json.dumps(message).encode() + b"\n")
        for number in list(server.open):
            server.answered({"id": number, "result": {}})
        answered = [message["id"] for message in wire.sent if "method" not in message]
        assert sorted(answered) == list(range(len(said)))

    asyncio.run(run())
