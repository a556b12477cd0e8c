from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import stat
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from broker.errors import Code, CortexError
from broker.sandbox.journal_files import JournalFiles
from broker.sandbox.limits import LinkLimits, TokenBucket
from broker.sandbox.link import Link, incarnation_secret
from broker.sandbox.slots import Slots
from broker.sandbox.sockets import SlotSockets
from sandbox_agent.wire.codec import MAX_PREAMBLE, Decoder, pack
from sandbox_agent.wire.messages import Attach, Bound, Build, Built, Hello, Preamble, Status, Stop, Welcome
from tests.unit.broker.sandbox.scripted_agent import ScriptedAgent, read, say

KEY = b"k" * 32
ATTACH = Attach(connection="c1", protocol="acp", client="ide")


@pytest.fixture
def sockets(tmp_path: Path) -> Iterator[SlotSockets]:
    slots = Slots(tmp_path / "s", uid=os.geteuid())
    slots.check()
    made = SlotSockets(slots.create(slots.new_id()), gid=os.getegid())
    made.open()
    yield made
    made.close()


class Owner:
    """What a session would do with a link."""

    def __init__(self) -> None:
        self.hellos: list[Hello] = []
        self.statuses: asyncio.Queue[Status] = asyncio.Queue()
        self.lost: asyncio.Queue[str] = asyncio.Queue()
        self.refuse: Exception | None = None
        self.pauses: list[asyncio.Event] = []

    async def hello(self, link: Link, hello: Hello) -> Welcome:
        self.hellos.append(hello)
        if self.pauses:
            await self.pauses.pop().wait()
        if self.refuse:
            raise self.refuse
        return Welcome(incarnation=0, secret=b"", session="s1")


class Pair:
    """A link and the agent server at its other end."""

    def __init__(self, link: Link, owner: Owner, agent: ScriptedAgent, sockets: SlotSockets) -> None:
        self.link, self.owner, self.agent, self.sockets = link, owner, agent, sockets


@asynccontextmanager
async def paired(sockets: SlotSockets, *, incarnation: int = 3, **more: Any) -> AsyncIterator[Pair]:
    owner = Owner()
    link = Link(
        sockets,
        incarnation,
        installation_key=KEY,
        on_hello=owner.hello,
        on_status=owner.statuses.put_nowait,
        on_lost=owner.lost.put_nowait,
        **more,
    )
    link.start()
    agent = ScriptedAgent(sockets.slot.sock_dir / "agent")
    try:
        yield Pair(link, owner, agent, sockets)
    finally:
        agent.close()
        await link.close()


async def hung_up(sock: socket.socket) -> bool:
    return await read(sock) == b""


async def soon(awaitable: Any) -> Any:
    async with asyncio.timeout(5):
        return await awaitable


async def served(pair: Pair) -> None:
    """The link still does its work."""
    asking = asyncio.create_task(pair.link.probe())
    await pair.agent.answer_probe()
    assert (await asking).agent == "ready"


# -- the honest way ----------------------------------------------------------------------------


async def test_hello_is_welcomed_with_incarnation_and_secret(sockets: SlotSockets) -> None:
    async with paired(sockets) as pair:
        welcome = await pair.agent.hello(applied={"mcp": "h"})
        hello = await pair.link.wait_hello(5)
        assert hello.applied == {"mcp": "h"}
        assert pair.link.connected
        assert (welcome.incarnation, welcome.session) == (3, "s1")
        assert welcome.secret == incarnation_secret(KEY, sockets.slot.id, 3)
        assert welcome.secret != incarnation_secret(KEY, sockets.slot.id, 4)


async def test_bind_returns_what_was_applied(sockets: SlotSockets) -> None:
    async with paired(sockets) as pair:
        await pair.agent.hello()
        await pair.link.wait_hello(5)
        binding = asyncio.create_task(pair.link.bind({"mcp": []}, {"mcp": "h2"}, 9))
        bind = await pair.agent.answer_bind(effect={"mcp": "now"})
        assert (bind.parts, bind.hashes, bind.generation) == ({"mcp": []}, {"mcp": "h2"}, 9)
        bound = await binding
        assert (bound.applied, bound.effect) == ({"mcp": "h2"}, {"mcp": "now"})


async def test_a_big_bind_arrives_whole_at_a_slow_reader(sockets: SlotSockets) -> None:
    async with paired(sockets) as pair:
        await pair.agent.hello()
        await pair.link.wait_hello(5)
        content = os.urandom(3_000_000)
        binding = asyncio.create_task(pair.link.bind({"files": [content]}, {"files": "h"}, 1))
        bind = await pair.agent.answer_bind()
        assert bind.parts["files"] == [content]
        await soon(binding)
        await served(pair)


async def test_a_refused_bind_has_the_sandboxes_code_and_hint(sockets: SlotSockets) -> None:
    async with paired(sockets) as pair:
        await pair.agent.hello()
        await pair.link.wait_hello(5)
        for code, expected in (("agent.not_in_image", Code.AGENT_MISSING), ("nonsense", Code.SANDBOX_PROTOCOL)):
            binding = asyncio.create_task(pair.link.bind({"process": {}}, {"process": "h"}, 1))
            await pair.agent.answer_bind(ok=False, code=code, what="no such program", hint="add it")
            with pytest.raises(CortexError) as caught:
                await binding
            assert (caught.value.code, caught.value.what, caught.value.hint) == (expected, "no such program", "add it")


async def test_status_is_told_and_kept(sockets: SlotSockets) -> None:
    async with paired(sockets) as pair:
        await pair.agent.hello()
        await pair.agent.send(Status(agent="starting"))
        await pair.agent.send(Status(agent="ready", agent_info="{}"))
        assert (await soon(pair.owner.statuses.get())).agent == "starting"
        assert (await soon(pair.owner.statuses.get())).agent == "ready"
        assert pair.link.status == Status(agent="ready", agent_info="{}")


async def test_build_is_answered_by_built(sockets: SlotSockets) -> None:
    async with paired(sockets) as pair:
        await pair.agent.hello()
        await pair.link.wait_hello(5)
        building = asyncio.create_task(pair.link.build("npm", "x@1", scripts=False, registry="r", timeout=7))
        asked = await pair.agent.receive()
        assert isinstance(asked, Build)
        assert (asked.ecosystem, asked.package, asked.scripts, asked.registry, asked.timeout_s) == (
            ("npm", "x@1", False, "r", 7)
        )
        await pair.agent.send(Built(asked.id, True, integrity="i"))
        assert (await building).integrity == "i"


async def test_a_waiting_stream_is_taken_at_once_with_attach_written(sockets: SlotSockets) -> None:
    async with paired(sockets) as pair:
        await pair.agent.hello()
        far = await pair.agent.connect("stream")
        while not pair.link._streams:
            await asyncio.sleep(0)
        coro = pair.link.take_stream(ATTACH)
        with pytest.raises(StopIteration) as done:
            coro.send(None)
        near: socket.socket = done.value.value
        (message,) = Decoder().feed(await read(far))
        assert Attach.decode(message) == ATTACH
        await say(near, b"frame")
        assert await read(far) == b"frame"
        assert near.getblocking() is False
        near.close()


async def test_takers_wait_for_streams_and_dead_streams_are_passed_over(sockets: SlotSockets) -> None:
    async with paired(sockets) as pair:
        await pair.agent.hello()
        dead = await pair.agent.connect("stream")
        while not pair.link._streams:
            await asyncio.sleep(0)
        dead.close()
        taking = asyncio.create_task(pair.link.take_stream(ATTACH))
        gave_up = asyncio.create_task(pair.link.take_stream(ATTACH))
        await asyncio.sleep(0)
        gave_up.cancel()
        far = await pair.agent.connect("stream")
        near = await soon(taking)
        assert await read(far)
        near.close()


async def test_no_stream_in_time_is_an_error(sockets: SlotSockets) -> None:
    async with paired(sockets) as pair:
        await pair.agent.hello()
        with pytest.raises(CortexError) as caught:
            await pair.link.take_stream(ATTACH, timeout=0.05)
        assert caught.value.code is Code.BRINGUP_TIMEOUT
        assert pair.link._streams.waiting == 0


async def test_stop_is_said_and_waits_for_the_end_without_a_loss(sockets: SlotSockets) -> None:
    async with paired(sockets, limits=LinkLimits(redial_timeout_s=0.01)) as pair:
        await pair.agent.hello()
        await pair.link.wait_hello(5)
        stopping = asyncio.create_task(pair.link.stop(5))
        assert await pair.agent.receive() == Stop(5)
        assert pair.agent.control is not None
        pair.agent.control.close()
        await soon(stopping)
        await asyncio.sleep(0.05)
        assert pair.owner.lost.empty()


async def test_stop_is_bounded_when_the_agent_server_ignores_it(
    sockets: SlotSockets, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("broker.sandbox.link._STOP_MARGIN", 0.01)
    async with paired(sockets) as pair:
        await pair.agent.hello()
        await pair.link.wait_hello(5)
        await soon(pair.link.stop(0.01))


# -- redials, restarts, fences -----------------------------------------------------------------


async def test_a_redial_presents_the_secret_and_is_asked_again(sockets: SlotSockets) -> None:
    async with paired(sockets) as pair:
        await pair.agent.hello()
        await pair.link.wait_hello(5)
        asking = asyncio.create_task(pair.link.probe())
        await pair.agent.receive()
        assert pair.agent.control is not None
        pair.agent.control.close()
        with pytest.raises(CortexError) as caught:
            await asking
        assert caught.value.code is Code.SANDBOX_DIED
        await pair.agent.hello(applied={"mcp": "kept"})
        assert [hello.applied for hello in pair.owner.hellos] == [{}, {"mcp": "kept"}]
        await served(pair)
        assert pair.owner.lost.empty()


async def test_a_newer_control_connection_takes_over(sockets: SlotSockets) -> None:
    async with paired(sockets) as pair:
        await pair.agent.hello()
        old = pair.agent.control
        assert old is not None
        await pair.agent.hello()
        assert await hung_up(old)
        await served(pair)
        assert pair.owner.lost.empty()


async def test_control_that_stays_away_is_a_loss_told_once(sockets: SlotSockets) -> None:
    async with paired(sockets, limits=LinkLimits(redial_timeout_s=0.02)) as pair:
        await pair.agent.hello()
        assert pair.agent.control is not None
        pair.agent.control.close()
        assert "call again" in await soon(pair.owner.lost.get())
        with pytest.raises(CortexError):
            await pair.link.bind({}, {}, 1)
        await pair.link.close()
        assert pair.owner.lost.empty()


async def test_after_a_restart_only_the_secret_opens(sockets: SlotSockets) -> None:
    async with paired(sockets, welcomed=True) as pair:
        stranger = await pair.agent.connect("control", secret=b"")
        assert await hung_up(stranger)
        pair.agent.secret = incarnation_secret(KEY, sockets.slot.id, 3)
        far = await pair.agent.connect("stream")
        near = await soon(pair.link.take_stream(ATTACH))
        assert await read(far)
        near.close()
        await pair.agent.hello(agent="ready", agent_info="{}")
        assert (await pair.link.wait_hello(5)).agent_info == "{}"


async def test_a_closed_link_refuses_everything_and_the_next_incarnation_works(sockets: SlotSockets) -> None:
    async with paired(sockets) as old:
        await old.agent.hello()
        await old.link.wait_hello(5)
        waiting = asyncio.create_task(old.link.take_stream(ATTACH))
        await asyncio.sleep(0)
        await old.link.close("replaced")
        for call in (
            waiting,
            old.link.bind({}, {}, 1),
            old.link.probe(),
            old.link.take_stream(ATTACH),
            old.link.wait_hello(1),
            old.link.build("npm", "x", scripts=False),
        ):
            with pytest.raises(CortexError) as caught:
                await soon(call)
            assert caught.value.code is Code.SANDBOX_DIED
        await soon(old.link.stop(1))
        assert old.owner.lost.empty()
        async with paired(sockets, incarnation=4) as new:
            late = await old.agent.connect("stream")
            assert await hung_up(late)
            assert (await new.agent.hello()).incarnation == 4
            await served(new)


async def test_a_hello_that_cannot_be_answered_is_a_loss(sockets: SlotSockets) -> None:
    async with paired(sockets) as pair:
        pair.owner.refuse = CortexError(Code.DISK_FULL, "no space", hint="free some")
        with pytest.raises(EOFError):
            await pair.agent.hello()
        assert "no space" in await soon(pair.owner.lost.get())
        with pytest.raises(CortexError):
            await pair.link.wait_hello(5)


async def test_no_hello_in_time_is_an_error(sockets: SlotSockets) -> None:
    async with paired(sockets) as pair:
        with pytest.raises(CortexError) as caught:
            await pair.link.wait_hello(0.02)
        assert caught.value.code is Code.BRINGUP_TIMEOUT


async def test_a_silent_sandbox_ends_a_bind_at_its_deadline(sockets: SlotSockets) -> None:
    async with paired(sockets) as pair:
        await pair.agent.hello()
        await pair.link.wait_hello(5)
        binding = asyncio.create_task(pair.link.bind({"mcp": []}, {"mcp": "h"}, 1, timeout=0.05))
        bind = await pair.agent.receive()
        with pytest.raises(CortexError) as caught:
            await binding
        assert caught.value.code is Code.BRINGUP_TIMEOUT
        await pair.agent.send(Bound(bind.id, True))  # type: ignore[attr-defined]
        await served(pair)
        assert pair.link.violations == 0


async def test_a_bind_over_the_wires_limit_is_an_error_and_breaks_nothing(sockets: SlotSockets) -> None:
    async with paired(sockets) as pair:
        await pair.agent.hello()
        await pair.link.wait_hello(5)
        with pytest.raises(CortexError) as caught:
            await pair.link.bind({"files": [b"x" * 9_000_000]}, {"files": "h"}, 1)
        assert caught.value.code is Code.BAD_CONFIG
        await served(pair)


# -- the journal -------------------------------------------------------------------------------


async def test_a_grant_carries_one_descriptor_of_a_private_appending_file(sockets: SlotSockets, tmp_path: Path) -> None:
    directory = tmp_path / "journal"
    directory.mkdir()
    async with paired(sockets, journal=JournalFiles(directory, keep=2)) as pair:
        await pair.agent.hello()
        for segment, expected in ((-1, (0, 0, 0)), (1, (1, 0, 1)), (2, (2, 1, 2)), (1, (1, 1, 2)), (-1, (2, 1, 2))):
            granted = await pair.agent.journal(segment)
            assert granted is not None
            grant, (fd,) = granted
            assert (grant["segment"], grant["first"], grant["last"]) == expected
            assert fcntl.fcntl(fd, fcntl.F_GETFL) & (os.O_APPEND | os.O_RDWR) == os.O_APPEND | os.O_RDWR
            os.write(fd, b"record")
            assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o600
            os.close(fd)
        assert sorted(path.name for path in directory.iterdir()) == ["0000000001.seg", "0000000002.seg"]


@pytest.mark.parametrize("segment", [5, -7, 10**18])
async def test_other_segments_are_refused(sockets: SlotSockets, tmp_path: Path, segment: int) -> None:
    async with paired(sockets, journal=JournalFiles(tmp_path)) as pair:
        await pair.agent.hello()
        assert await pair.agent.journal(segment) is None
        assert pair.link.violations == 1
        await served(pair)


async def test_a_segment_that_is_a_link_is_not_followed(sockets: SlotSockets, tmp_path: Path) -> None:
    directory = tmp_path / "journal"
    directory.mkdir()
    (directory / "0000000000.seg").symlink_to("/etc/passwd")
    async with paired(sockets, journal=JournalFiles(directory)) as pair:
        await pair.agent.hello()
        assert await pair.agent.journal(-1) is None


async def test_no_journal_without_the_secret(sockets: SlotSockets, tmp_path: Path) -> None:
    async with paired(sockets, journal=JournalFiles(tmp_path)) as pair:
        await pair.agent.hello()
        assert await pair.agent.journal(-1, secret=b"guess") is None
        assert list(tmp_path.glob("*.seg")) == []


# -- hostile peers -----------------------------------------------------------------------------


async def garbage(agent: ScriptedAgent) -> socket.socket:
    sock = await agent.raw()
    await say(sock, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    return sock


async def oversized(agent: ScriptedAgent) -> socket.socket:
    sock = await agent.raw()
    await say(sock, (MAX_PREAMBLE + 1).to_bytes(4, "big"))
    return sock


async def not_a_map(agent: ScriptedAgent) -> socket.socket:
    sock = await agent.raw()
    await say(sock, b"\0\0\0\1\x01")
    return sock


async def silent(agent: ScriptedAgent) -> socket.socket:
    return await agent.raw()


async def half(agent: ScriptedAgent) -> socket.socket:
    sock = await agent.raw()
    await say(sock, pack(Preamble("stream", 1).encode())[:7])
    return sock


async def wrong_secret(agent: ScriptedAgent) -> socket.socket:
    sock: socket.socket = await agent.connect("stream", secret=b"x" * 32)
    return sock


async def no_secret(agent: ScriptedAgent) -> socket.socket:
    sock: socket.socket = await agent.connect("control", secret=b"")
    await say(sock, pack(Hello(pid=1).encode()))
    return sock


async def wrong_version(agent: ScriptedAgent) -> socket.socket:
    sock: socket.socket = await agent.connect("stream", version=99)
    return sock


async def unknown_kind(agent: ScriptedAgent) -> socket.socket:
    sock: socket.socket = await agent.connect("root-shell")
    return sock


@pytest.mark.parametrize(
    "attack",
    [garbage, oversized, not_a_map, silent, half, wrong_secret, no_secret, wrong_version, unknown_kind],
    ids=lambda attack: attack.__name__,
)
async def test_a_bad_connection_is_closed_and_counted_and_nobody_else_notices(
    sockets: SlotSockets, attack: Any
) -> None:
    async with paired(sockets, limits=LinkLimits(preamble_timeout_s=0.1)) as pair:
        await pair.agent.hello()
        sock = await attack(pair.agent)
        assert await hung_up(sock)
        assert pair.link.violations == 1
        await served(pair)
        assert pair.owner.lost.empty()
        assert len(pair.owner.hellos) == 1


@pytest.mark.parametrize(
    "message",
    [
        Hello(pid=1).encode(),
        {"t": "bound", "id": 99, "ok": True},
        {"t": "status", "agent": "exploded"},
        {"t": "status", "agent": "ready", "what": "x" * 70_000},
        {"t": "status", "agent": 5},
        {"t": "stop"},
        {"t": "built", "id": 1, "ok": True, "bins": {str(n): "x" for n in range(2000)}},
    ],
    ids=["second hello", "answer to nothing", "state", "long", "type", "ours", "many"],
)
async def test_a_bad_message_on_control_ends_that_connection(sockets: SlotSockets, message: dict[str, Any]) -> None:
    async with paired(sockets) as pair:
        await pair.agent.hello()
        await pair.link.wait_hello(5)
        assert pair.agent.control is not None
        await say(pair.agent.control, pack(message))
        with pytest.raises(EOFError):
            await pair.agent.receive()
        assert pair.link.violations == 1
        assert pair.owner.statuses.empty()
        await pair.agent.hello()
        await served(pair)


async def test_an_answer_of_another_kind_is_a_violation(sockets: SlotSockets) -> None:
    async with paired(sockets) as pair:
        await pair.agent.hello()
        await pair.link.wait_hello(5)
        binding = asyncio.create_task(pair.link.bind({"mcp": []}, {"mcp": "h"}, 1))
        bind = await pair.agent.receive()
        await pair.agent.send(Built(bind.id, True))  # type: ignore[attr-defined]
        with pytest.raises(CortexError):
            await soon(binding)
        assert pair.link.violations == 1


async def test_an_oversized_message_is_refused_before_its_body(sockets: SlotSockets) -> None:
    async with paired(sockets) as pair:
        await pair.agent.hello()
        assert pair.agent.control is not None
        await say(pair.agent.control, (2**20).to_bytes(4, "big"))
        with pytest.raises(EOFError):
            await pair.agent.receive()
        assert pair.link.violations == 1


async def test_the_first_hello_is_accepted_once(sockets: SlotSockets) -> None:
    async with paired(sockets) as pair:
        socks = [await pair.agent.connect("control", secret=b"") for _ in range(2)]
        for sock in socks:
            await say(sock, pack(Hello(pid=1).encode()))
        answers = [await read(sock) for sock in socks]
        assert sorted(bool(answer) for answer in answers) == [False, True]
        assert pair.link.violations == 1
        assert len(pair.owner.hellos) == 1


async def test_a_flood_of_messages_loses_the_sandbox(sockets: SlotSockets) -> None:
    async with paired(sockets, limits=LinkLimits(message_burst=20, messages_per_s=1)) as pair:
        await pair.agent.hello()
        assert pair.agent.control is not None
        with suppress(ConnectionError):
            await say(pair.agent.control, pack(Status(agent="ready").encode()) * 200)
        assert "more messages" in await soon(pair.owner.lost.get())
        assert pair.owner.statuses.qsize() < 25


async def test_a_crowd_of_strangers_is_bounded_and_an_honest_stream_gets_through(sockets: SlotSockets) -> None:
    limits = LinkLimits(max_unauthenticated=4, max_violations=100)
    async with paired(sockets, limits=limits) as pair:
        await pair.agent.hello()
        crowd = [await pair.agent.raw() for _ in range(20)]
        far = await pair.agent.connect("stream")
        near = await soon(pair.link.take_stream(ATTACH))
        assert await read(far)
        near.close()
        assert await hung_up(crowd[0])
        assert pair.link.violations >= 16
        assert len(pair.link._gate._strangers) <= 4


async def test_idle_streams_are_bounded(sockets: SlotSockets) -> None:
    async with paired(sockets, limits=LinkLimits(max_idle_streams=3)) as pair:
        await pair.agent.hello()
        streams = [await pair.agent.connect("stream") for _ in range(5)]
        assert await hung_up(streams[3])
        assert await hung_up(streams[4])
        assert pair.link.violations == 2
        assert len(pair.link._streams) == 3


async def test_a_stream_that_speaks_before_its_attach_is_dropped(sockets: SlotSockets) -> None:
    async with paired(sockets) as pair:
        await pair.agent.hello()
        early = await pair.agent.connect("stream")
        await say(early, b"\x81\x05hello")
        while not pair.link._streams:
            await asyncio.sleep(0)
        taking = asyncio.create_task(pair.link.take_stream(ATTACH))
        assert await hung_up(early)
        await pair.agent.connect("stream")
        (await soon(taking)).close()
        assert pair.link.violations == 1


async def test_too_many_violations_lose_the_sandbox(sockets: SlotSockets) -> None:
    async with paired(sockets, limits=LinkLimits(max_violations=3)) as pair:
        await pair.agent.hello()
        for _ in range(4):
            sock = await garbage(pair.agent)
            await hung_up(sock)
        assert "broke the protocol 4 times" in await soon(pair.owner.lost.get())
        with pytest.raises(CortexError):
            await pair.link.probe()


async def test_another_version_says_so(sockets: SlotSockets) -> None:
    async with paired(sockets) as pair:
        await hung_up(await pair.agent.connect("control", version=99))
        assert "version 99" in await soon(pair.owner.lost.get())


async def test_a_sandbox_that_never_reads_is_cut_off(sockets: SlotSockets) -> None:
    async with paired(sockets, limits=LinkLimits(redial_timeout_s=0.01)) as pair:
        await pair.agent.hello()
        await pair.link.wait_hello(5)
        parts = {"files": [b"x" * 7_000_000]}
        binds = [asyncio.create_task(pair.link.bind(parts, {"files": "h"}, n, timeout=30)) for n in range(4)]
        for bind in binds:
            with pytest.raises(CortexError):
                await soon(bind)
        assert await soon(pair.owner.lost.get())


async def test_dials_are_throttled_and_served_in_the_end(sockets: SlotSockets) -> None:
    async with paired(sockets, limits=LinkLimits(accept_burst=2, accept_per_s=200)) as pair:
        await pair.agent.hello()
        for _ in range(10):
            (await pair.agent.connect("stream")).close()
        await pair.agent.connect("stream")
        (await soon(pair.link.take_stream(ATTACH))).close()
        assert pair.owner.lost.empty()


# -- sockets and bucket ------------------------------------------------------------------------


def test_sockets_replace_what_an_earlier_run_left(sockets: SlotSockets) -> None:
    again = SlotSockets(sockets.slot, gid=os.getegid())
    again.open()
    for name in ("agent", "gateway", "egress"):
        mode = (sockets.slot.sock_dir / name).stat().st_mode
        assert stat.S_ISSOCK(mode)
        assert stat.S_IMODE(mode) == 0o660
    client = socket.socket(socket.AF_UNIX)
    client.connect(os.fspath(sockets.slot.sock_dir / "gateway"))
    copy = socket.socket(fileno=os.dup(again.fds[0]))
    copy.accept()[0].close()
    copy.close()
    client.close()
    again.close()
    again.close()
    assert list(sockets.slot.sock_dir.iterdir()) == []


def test_a_bucket_gives_its_burst_then_its_rate() -> None:
    bucket = TokenBucket(3, 8)
    assert [bucket.take(100.0) for _ in range(4)] == [True, True, True, False]
    assert bucket.take(100.125)
    assert not bucket.take(100.1875)
    assert bucket.take(99.0) is False
    other = TokenBucket(1, 10)
    assert [round(other.reserve(5.0), 6) for _ in range(3)] == [0, 0.1, 0.2]


async def test_a_connection_whose_place_was_taken_cannot_lose_the_sandbox(sockets: SlotSockets) -> None:
    async with paired(sockets) as pair:
        await pair.agent.hello()
        slow, pair.owner.refuse = asyncio.Event(), CortexError(Code.STORE_ERROR, "slow", hint="-")
        pair.owner.pauses.append(slow)
        control = await pair.agent.connect("control")
        await say(control, pack(Hello(pid=7).encode()))
        while len(pair.owner.hellos) < 2:
            await asyncio.sleep(0.001)
        refuse, pair.owner.refuse = pair.owner.refuse, None
        await pair.agent.hello()
        pair.owner.refuse = refuse
        slow.set()
        assert await hung_up(control)
        assert pair.owner.lost.empty()
        await served(pair)


async def test_of_two_that_dialled_before_the_first_hello_one_is_welcomed(sockets: SlotSockets) -> None:
    async with paired(sockets) as pair:
        first, second = await pair.agent.connect("control"), await pair.agent.connect("control")
        # Both preambles are read, and both were right to have no secret, before either says Hello.
        for _ in range(20):
            await asyncio.sleep(0.001)
        await say(first, pack(Hello(pid=1).encode()))
        assert await read(first)
        await say(second, pack(Hello(pid=2).encode()))
        assert await hung_up(second)
        assert [hello.pid for hello in pair.owner.hellos] == [1]
        assert pair.link.violations == 1
        assert pair.link.connected
