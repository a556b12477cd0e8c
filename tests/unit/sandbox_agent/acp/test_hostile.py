"""Clients and agents that misbehave, and clients that are slow; a well-behaved client beside them notices nothing."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
import tempfile
from pathlib import Path

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox_agent.clients import frame
from tests.unit.sandbox_agent.acp.kit import Bench, Files, Peer, cortex, of_kind, prompt


def masked(payload: bytes, first: int = 0x81) -> bytes:
    """A client's frame; ``first`` is its first byte."""
    size = len(payload)
    length = struct.pack("!B", 0x80 | size) if size < 126 else struct.pack("!BQ", 0x80 | 127, size)
    return bytes([first]) + length + b"\0\0\0\0" + payload


async def test_malformed_messages_are_answered_and_the_next_good_one_works(bench: Bench) -> None:
    bench.start()
    peer = bench.connect()
    for text, code in (
        ("{", -32700),
        ("NaN", -32700),
        ("[" * 50_000, -32700),
        ('[{"jsonrpc":"2.0","id":1,"method":"initialize"}]', -32600),
        ("7", -32600),
        ('{"id":{},"method":"x"}', -32600),
        ('{"id":true,"method":"x"}', -32600),
        ('{"id":1,"method":7}', -32600),
        ('{"id":1,"method":"x","params":"y"}', -32600),
        ('{"jsonrpc":"3.0","id":1,"method":"x"}', -32600),
    ):
        await peer.send_text(text)
        reply = await peer.until(lambda m: m.get("id", 0) is None)
        assert reply["error"]["code"] == code
        assert reply["error"]["data"]["hint"]
        assert cortex(reply)["seq"] > 0
    assert "result" in await peer.request("initialize", {"protocolVersion": 1})
    assert {m["method"] for m in bench.agent.got} == {"initialize"}


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("initialize", {"protocolVersion": "1"}),
        ("initialize", {"protocolVersion": True}),
        ("initialize", []),
        ("session/new", []),
        ("session/load", {"sessionId": 7}),
        ("session/load", {"sessionId": ["s1"]}),
        ("session/prompt", {"sessionId": {}, "prompt": []}),
        ("session/prompt", {"prompt": []}),
        ("session/prompt", {"sessionId": "s1", "prompt": "text"}),
        ("session/prompt", {"sessionId": "s1", "prompt": [], "_meta": {"cortex": {"messageId": 7}}}),
        ("session/prompt", {"sessionId": "s1", "prompt": [], "_meta": {"cortex": {"messageId": "x" * 2000}}}),
        ("session/list", {"cursor": 7}),
        ("session/list", {"cursor": "-1"}),
        ("session/list", {"cursor": "9" * 50}),
        ("session/set_mode", {"sessionId": "other", "modeId": 1}),
        ("_cortex/unknown", {}),
    ],
)
async def test_wrong_types_are_errors_for_the_sender(bench: Bench, method: str, params: object) -> None:
    bench.start()
    peer = bench.connect()
    await bench.session(peer)
    await peer.send({"id": "q", "method": method, "params": params})
    assert "error" in await peer.answer_to("q")
    assert bench.hub.open_turns == 0
    assert not bench.agent.all("session/prompt")


@pytest.mark.parametrize("meta", [None, 7, [], {"cortex": None}, {"cortex": []}, {"cortex": {"messageId": ""}}])
async def test_odd_meta_is_no_message_id(bench: Bench, meta: object) -> None:
    bench.start()
    peer = bench.connect()
    session = await bench.session(peer)
    for times in (1, 2):
        request = await peer.ask("session/prompt", {**prompt(session), "_meta": meta})
        await bench.agent.asked("session/prompt", times)
        bench.agent.answer("session/prompt", {"stopReason": "end_turn"})
        await peer.answer_to(request)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"\x81\x02hi", 1002),
        (masked(b"{}", 0xC1), 1002),
        (masked(b"{}", 0x83), 1002),
        (masked(b"\xff\xfe"), 1007),
        (masked(b"x", 0x80), 1002),
        (masked(b"x" * 5000), 1009),
        (masked(b"x" * 3000, 0x01) + masked(b"x" * 3000, 0x80), 1009),
        (b"\x81\xff\xff\xff\xff\xff\xff\xff\xff\xff", 1009),
    ],
)
async def test_broken_frames_close_that_client_alone(bench: Bench, data: bytes, code: int) -> None:
    bench.start(max_message_bytes=4096)
    good, bad = bench.connect(), bench.connect()
    session = await bench.session(good)
    await bad.send_raw(data)
    closed = await bad.until_closed()
    assert closed is not None
    assert closed[0] == code
    bench.agent.update(session, "still here")
    assert await good.texts(1) == ["still here"]
    assert bench.hub.clients == 1


async def test_fragments_with_controls_between_make_one_message(bench: Bench) -> None:
    bench.start()
    peer = bench.connect()
    text = json.dumps({"id": 1, "method": "initialize", "params": {"protocolVersion": 1, "x": "é"}}, ensure_ascii=False)
    data = text.encode()
    cut = data.index("é".encode()) + 1
    await peer.send_raw(masked(b"", 0x01) + masked(data[:cut], 0x00) + masked(b"p", 0x89) + masked(b"", 0x00))
    for byte in data[cut:-1]:
        await peer.send_raw(masked(bytes([byte]), 0x00))
    await peer.send_raw(masked(data[-1:], 0x80))
    assert "result" in await peer.answer_to(1)


async def test_a_flood_of_garbage_ends_that_client_with_a_reason(bench: Bench) -> None:
    bench.start()
    peer = bench.connect()
    await peer.send_raw(masked(b"garbage") * 300)
    closed = await peer.until_closed()
    assert closed is not None
    assert closed[0] == 4400
    assert len(peer.everything) < 101
    binary = bench.connect()
    await binary.send_raw(masked(b"{", 0x82) * 99 + masked(b"{"))
    closed = await binary.until_closed()
    assert closed is not None
    assert closed[0] == 4400


async def test_a_flood_of_requests_is_bounded_and_others_are_served(bench: Bench) -> None:
    bench.start()
    good, flooding = bench.connect(), bench.connect()
    session = await bench.session(good)
    bench.agent.on["_vendor/slow"] = lambda params: None
    flood = b"".join(
        masked(json.dumps({"id": n, "method": "_vendor/slow", "params": {}}).encode()) for n in range(1000)
    )
    await flooding.send_raw(flood)
    refused = await flooding.until(lambda m: "error" in m)
    assert refused["error"]["data"]["code"] == "session.overloaded"
    assert len(bench.agent.all("_vendor/slow")) <= 256
    for n in range(20):
        await flooding.send({"id": f"n{n}", "method": "session/new", "params": {"cwd": "/", "mcpServers": []}})
    assert "error" in await flooding.answer_to("n0")
    request = await bench.prompt(good, session)
    await bench.agent.asked("session/prompt")
    bench.agent.answer("session/prompt", {"stopReason": "end_turn"})
    assert "result" in await good.answer_to(request)


async def test_requests_of_a_client_that_reads_no_answers_stop_being_read(bench: Bench) -> None:
    bench.start(client_buffer_bytes=4096)
    good, deaf = bench.connect(), bench.connect()
    session = await bench.session(good)
    deaf.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
    listing = masked(json.dumps({"id": 1, "method": "session/list", "params": {}}).encode())
    sent = 0
    try:
        async with asyncio.timeout(0.4):
            while True:
                await deaf.send_raw(listing * 50)
                sent += 50
    except TimeoutError:
        pass
    assert sent < 20_000
    [client] = [c for c in bench.hub._outbox.clients if len(c.inserts)]
    assert len(client.inserts) < 500
    bench.agent.update(session, "fine")
    assert await good.texts(1) == ["fine"]


async def test_answers_to_requests_that_were_never_made_are_ignored(bench: Bench) -> None:
    bench.start()
    one, stranger = bench.connect(), bench.connect()
    session = await bench.session(one)
    ask = {"sessionId": session, "toolCall": {"toolCallId": "t"}, "options": []}
    bench.agent.say({"id": 5, "method": "session/request_permission", "params": ask})
    asked = await one.until(lambda m: m.get("method") == "session/request_permission")
    for answer in (asked["id"], str(asked["id"]), 5, None, float(asked["id"])):
        await stranger.send({"id": answer, "result": {"outcome": {"outcome": "selected", "optionId": "yes"}}})
    await stranger.request("session/list")
    assert not [m for m in bench.agent.got if m.get("id") == 5 and "method" not in m]
    await one.send({"id": asked["id"], "result": "nonsense"})
    await bench.agent.until(lambda: any(m.get("id") == 5 and "method" not in m for m in bench.agent.got))
    assert bench.agent.got[-1]["result"] == {"outcome": {"outcome": "cancelled"}}


async def test_garbage_from_the_agent_is_counted_and_dropped(bench: Bench) -> None:
    hub = bench.start(max_message_bytes=4096)
    peer = bench.connect()
    session = await bench.session(peer)
    lines = [
        *(b"Listening on stdio", b"\xff\xfe", b"[]", b"{}", b"null", b'{"id":99,"result":{}}', b"[" * 4000),
        *(b'{"id":"x","result":1}', b'{"id":true,"method":"x"}', b'{"method":"session/update","params":[]}'),
        b'{"method":"session/update","params":{"sessionId":"' + b"x" * 5000 + b'"}}',
        b'{"method":"session/update","params":{"sessionId":["a"],"update":{}}}',
        b'{"method":"session/update","params":{"sessionId":"s1","update":"text"}}',
    ]
    hub.agent_lines(lines)
    bench.agent.update(session, "good")
    assert await peer.texts(1) == ["good"]
    assert hub.garbage == len(lines)
    assert len(peer.everything) == 2


async def test_a_flood_of_requests_from_the_agent_is_bounded(bench: Bench) -> None:
    bench.start()
    peer = bench.connect()
    session = await bench.session(peer)
    for number in range(300):
        bench.agent.say({"id": number, "method": "session/request_permission", "params": {"sessionId": session}})
    refused = [m for m in bench.agent.got if "error" in m]
    assert len(refused) == 44
    await peer.notify("session/cancel", {"sessionId": session})
    await bench.agent.until(lambda: len([m for m in bench.agent.got if "result" in m]) == 256)


async def test_a_slow_client_falls_behind_costs_no_memory_and_gets_everything_in_order(bench: Bench) -> None:
    bench.start(client_buffer_bytes=16_384, journal_segment_bytes=300_000)
    quick, slow = bench.connect(), bench.connect()
    session = await bench.session(quick)
    slow.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    await slow.request("session/resume", {"sessionId": session, "cwd": "/"})
    for number in range(1000):
        bench.agent.update(session, f"{number:04}" + "x" * 1000)
        if number % 100 == 99:
            await quick.texts(100)
    [client] = [c for c in bench.hub._outbox.clients if not c.direct]
    assert client._transport is not None
    assert client._transport.get_write_buffer_size() < 300_000
    assert client.inserts == type(client.inserts)()
    listing = await slow.ask("session/list", {})
    request = await bench.prompt(slow, session)
    await bench.agent.asked("session/prompt")
    bench.agent.answer("session/prompt", {"stopReason": "end_turn"})
    assert [text[:4] for text in await slow.texts(1000)] == [f"{number:04}" for number in range(1000)]
    await slow.answer_to(listing)
    await slow.answer_to(request)
    seqs = [cortex(m)["seq"] for m in slow.everything]
    assert seqs == sorted(set(seqs))
    bench.agent.update(session, "live again")
    assert await slow.texts(1) == ["live again"]
    assert client.direct


async def test_a_client_that_takes_nothing_is_closed_4408_and_the_agent_is_never_held(bench: Bench) -> None:
    bench.start(client_buffer_bytes=16_384, stall_timeout_s=0.4)
    good, stuck = bench.connect(), bench.connect()
    session = await bench.session(good)
    await stuck.request("session/resume", {"sessionId": session, "cwd": "/"})
    for _ in range(1000):
        bench.agent.update(session, "x" * 1000)
    await good.texts(1000)
    async with asyncio.timeout(5):
        while not any(c.closing for c in bench.hub._outbox.clients):
            await asyncio.sleep(0.05)
    assert not bench.agent.held
    closed = await stuck.until_closed()
    assert closed is not None
    assert closed[0] == 4408
    bench.agent.update(session, "fine")
    assert await good.texts(1) == ["fine"]


async def test_a_client_behind_a_segment_that_is_gone_is_closed_4408(bench: Bench) -> None:
    bench.files = Files(bench.files.directory, keep=2)
    bench.start(client_buffer_bytes=4096, journal_segment_bytes=50_000)
    good, slow = bench.connect(), bench.connect()
    session = await bench.session(good)
    await slow.request("session/resume", {"sessionId": session, "cwd": "/"})
    for _ in range(1000):
        bench.agent.update(session, "x" * 1000)
        await good.texts(1)
    closed = await slow.until_closed()
    assert closed is not None
    assert closed[0] == 4408


async def test_history_larger_than_the_buffer_is_replayed_in_order_between_live_updates(bench: Bench) -> None:
    bench.start(client_buffer_bytes=8192, journal_segment_bytes=200_000)
    one, two = bench.connect(), bench.connect()
    session, other = await bench.session(one), await bench.session(one)
    for number in range(500):
        bench.agent.update(session, f"{number:04}" + "x" * 700)
        bench.agent.update(other, "noise")
    loading = await two.ask("session/load", {"sessionId": session, "cwd": "/", "mcpServers": []})
    await asyncio.sleep(0.01)
    bench.agent.update(session, "live")
    await two.answer_to(loading)
    history = [m["params"]["update"]["content"]["text"][:4] for m in two.everything if of_kind(m)]
    assert history[:500] == [f"{number:04}" for number in range(500)]
    bench.agent.update(session, "last")
    assert (await two.texts(502))[500:] == ["live", "last"]


async def test_closing_lets_clients_go_with_a_reason_and_closes_every_descriptor(bench: Bench) -> None:
    hub = bench.start()
    peer = bench.connect()
    await bench.session(peer)
    await hub.close()
    closed = await peer.until_closed()
    assert closed is not None
    assert closed[0] == 1001


def test_frames_of_every_length_are_right() -> None:
    for size in (0, 125, 126, 65535, 65536, 70000):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            peer = Peer(ours)
            peer._ws.receive_data(frame(b"x" * size))
            [event] = peer._ws.events_received()
            assert len(event.data) == size  # type: ignore[union-attr]


IDS = st.one_of(st.integers(-5, 5), st.integers(), st.text(max_size=5), st.floats(0, 3))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), IDS), max_size=12), st.randoms(use_true_random=False))
def test_whatever_ids_clients_choose_each_gets_its_own_answers(
    calls: list[tuple[int, object]], order: random.Random
) -> None:
    async def run(directory: str) -> None:
        bench = Bench(Path(directory))
        bench.start()
        try:
            await mapped(bench, calls, order)
        finally:
            await bench.stop()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner, tempfile.TemporaryDirectory() as directory:
        runner.run(run(directory))


async def mapped(bench: Bench, calls: list[tuple[int, object]], order: random.Random) -> None:
    agent, peers = bench.agent, [bench.connect() for _ in range(3)]
    for index, (number, request_id) in enumerate(calls):
        await peers[number].send({"id": request_id, "method": "_vendor/x", "params": {"index": index}})
    await agent.until(lambda: len(agent.all("_vendor/x")) == len(calls))
    asked = agent.all("_vendor/x")
    assert len({message["id"] for message in asked}) == len(calls)
    order.shuffle(asked)
    for message in asked:
        agent.say({"id": message["id"], "result": {"index": message["params"]["index"]}})
    for number, peer in enumerate(peers):
        mine = {index: request_id for index, (who, request_id) in enumerate(calls) if who == number}
        async with asyncio.timeout(5):
            while len(peer.everything) < len(mine):
                await peer.read()
        assert {m["result"]["index"]: m["id"] for m in peer.everything} == mine


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize("depth", [300, 950, 970, 980, 985, 990, 995])
async def test_nesting_of_any_depth_breaks_nothing(bench: Bench, depth: int) -> None:
    """Reading and writing reach their limits at different depths; in between lay a crash."""
    bench.start()
    peer = bench.connect()
    session = await bench.session(peer)
    for text in ('{"jsonrpc":"2.0","id":"deep","method":"_v/x","params":{"a":%s}}', '{"id":%s}'):
        await peer.send_text(text % nested(depth))
    request = await bench.prompt(peer, session)
    call = await bench.agent.asked("session/prompt")
    bench.hub.agent_lines(
        [
            b'{"jsonrpc":"2.0","id":%d,"result":{"a":%s}}' % (call["id"], nested(depth).encode()),
            b'{"jsonrpc":"2.0","method":"session/update","params":{"sessionId":"%s","a":%s}}'
            % (session.encode(), nested(depth).encode()),
            b'{"jsonrpc":"2.0","id":%d,"result":{"stopReason":"end_turn"}}' % call["id"],
        ]
    )
    assert (await peer.answer_to(request))["result"]["stopReason"] == "end_turn"
    assert bench.hub.garbage == 2


@pytest.mark.parametrize("name", ["\ud800", "a\udfff", "x" * 300, "\0"])
async def test_a_directory_that_cannot_be_named_is_no_crash(bench: Bench, name: str) -> None:
    bench.start()
    peer = bench.connect()
    cwd = f"{bench.home}/workspace/{name}"
    await peer.request("session/new", {"cwd": cwd, "mcpServers": [], "additionalDirectories": [cwd]})
    assert await bench.session(peer)


async def test_every_refusal_says_a_code_and_what_to_do(bench: Bench) -> None:
    bench.start()
    peer = bench.connect()
    session = await bench.session(peer)
    for method, params in (
        ("initialize", {"protocolVersion": "one"}),
        ("initialize", []),
        ("session/list", {"cursor": "x"}),
        ("session/prompt", {"sessionId": session, "prompt": "text"}),
        ("session/prompt", {"sessionId": session, "prompt": [1]}),
        ("session/prompt", {"sessionId": session, "prompt": [], "_meta": {"cortex": {"messageId": 5}}}),
        ("session/prompt", {"sessionId": "nope", "prompt": []}),
        ("_cortex/unheard_of", {}),
        ("authenticate", {"methodId": "login"}),
        ("session/set_mode", {"sessionId": "nope"}),
    ):
        error = (await peer.request(method, params))["error"]  # type: ignore[arg-type]
        assert error["data"]["code"], (method, params)
        assert error["data"]["hint"], (method, params)
    assert not bench.agent.all("session/prompt")


async def test_no_message_to_a_client_is_larger_than_the_relay_lets_through(bench: Bench) -> None:
    """What is written anew may be longer than what came in: another id, a number in full, an escape."""
    limit = 20_000
    bench.start(max_message_bytes=limit)
    peer, other = bench.connect(), bench.connect()
    session = await bench.session(peer)
    await other.request("session/resume", {"sessionId": session, "cwd": "/"})
    long_id = "i" * 1000
    await peer.ask("session/prompt", prompt(session, "\ud800" + "é" * 1000), long_id)
    call = await bench.agent.asked("session/prompt")
    numbers = "1e15," * 3000
    for method, number in (("session/request_permission", '"id":"p1",'), ("session/update", "")):
        text = '{"jsonrpc":"2.0",%s"method":"%s","params":{"sessionId":"%s","update":{},"_meta":{},"a":[%s1]}}'
        bench.hub.agent_lines([(text % (number, method, session, numbers)).encode()])
    assert next(m for m in bench.agent.got if m.get("id") == "p1")["error"]
    bench.agent.say({"id": call["id"], "result": {"stopReason": "end_turn", "a": "x" * (limit - 300)}})
    assert (await peer.answer_to(long_id))["error"]["data"]["code"] == "request.too_large"
    await other.request("session/list")
    sizes = [len(json.dumps(m, separators=(",", ":"))) for m in peer.everything + other.everything]
    assert max(sizes) <= limit
    assert bench.hub._outbox.dropped == 1
