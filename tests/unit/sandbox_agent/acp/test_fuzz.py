"""Whatever either side says, nothing raises and the hub goes on."""

from __future__ import annotations

import asyncio
import json
import tempfile
from pathlib import Path
from typing import Any

import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.sandbox_agent.acp.kit import Agent, Bench

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 5) | st.sampled_from(["s1", "s2", "", "x", "1"]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["a", "cortex", "id"]), inner, max_size=2)
    ),
    max_leaves=4,
)
PARAMS = st.fixed_dictionaries(
    {},
    optional={
        "sessionId": st.sampled_from(["s1", "s2", "nope"]) | JSON,
        "cwd": st.sampled_from(["/", "/x\0", "C:\\"]) | JSON,
        "mcpServers": JSON | st.lists(st.fixed_dictionaries({"name": JSON})),
        "prompt": JSON | st.just([{"type": "text", "text": "hi"}]),
        "update": JSON
        | st.fixed_dictionaries(
            {"sessionUpdate": st.sampled_from(["current_mode_update", "config_option_update", "session_info_update"])},
            optional={"currentModeId": JSON, "configOptions": JSON, "title": JSON},
        ),
        "_meta": JSON | st.fixed_dictionaries({"cortex": st.fixed_dictionaries({"messageId": JSON})}),
        "modeId": JSON,
        "requestId": JSON,
        "cursor": JSON,
        "additionalDirectories": JSON,
        "protocolVersion": JSON,
    },
)
METHODS = st.sampled_from(
    ["initialize", "authenticate", "session/new", "session/load", "session/resume", "session/list", "session/prompt",
     "session/cancel", "session/close", "session/delete", "session/fork", "session/set_mode", "session/update",
     "session/set_config_option", "session/request_permission", "$/cancel_request", "$/ping", "_cortex/x", "_v/x",
     "fs/read_text_file"]
)  # fmt: skip
IDS = st.integers(0, 6) | JSON
MESSAGE = st.one_of(
    st.fixed_dictionaries(
        {"method": METHODS}, optional={"id": IDS, "params": PARAMS | JSON, "jsonrpc": st.just("2.0")}
    ),
    st.fixed_dictionaries({"id": IDS, "result": PARAMS | JSON}),
    st.fixed_dictionaries({"id": IDS, "error": JSON | st.just({"code": 1, "message": "x", "data": [1]})}),
    JSON,
)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["agent", "one", "two", "restart"]), MESSAGE), max_size=25))
def test_no_message_from_either_side_breaks_the_hub(said: list[tuple[str, Any]]) -> None:
    async def run(directory: str) -> None:
        errors: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
        bench = Bench(Path(directory))
        bench.start(stall_timeout_s=60.0, journal_segment_bytes=2000)
        try:
            peers = {"one": bench.connect(cortex=True), "two": bench.connect()}
            session = await bench.session(peers["one"])
            for who, message in said:
                if who == "restart":
                    bench.restart_agent(Agent())
                    while not bench.hub.agent_info:
                        await asyncio.sleep(0)
                elif who == "agent":
                    bench.hub.agent_lines([json.dumps(message).encode()])
                else:
                    await peers[who].send_text(json.dumps(message))
                    await asyncio.sleep(0)
            good = bench.connect()
            await good.request("session/list")
            session = await bench.session(good)
            request = await bench.prompt(good, session, "still?")
            await bench.agent.asked("session/prompt")
            while good.seen == [] or not any(m.get("id") == request for m in good.seen):
                for message in bench.agent.all("session/prompt"):
                    bench.agent.say({"id": message["id"], "result": {"stopReason": "end_turn"}})
                await good.read()
            assert errors == []
        finally:
            await bench.stop()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner, tempfile.TemporaryDirectory() as directory:
        runner.run(asyncio.wait_for(run(directory), 20))
