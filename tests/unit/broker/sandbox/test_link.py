from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import stat
from pathlib import Path

import pytest

from broker.errors import Code, CortexError
from broker.sandbox.journal_files import JournalFiles
from broker.sandbox.limits import LinkLimits
from broker.sandbox.link import incarnation_secret
from broker.sandbox.sockets import SlotSockets
from sandbox_agent.wire.codec import Decoder
from sandbox_agent.wire.messages import MAX_CREDENTIAL_FILE, Attach, Bound, Build, Built, Refreshed, Status, Stop
from tests.unit.broker.sandbox.link_rig import ATTACH, KEY, hung_up, paired, served, soon
from tests.unit.broker.sandbox.scripted_agent import read, say

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


async def test_a_refreshed_credential_file_is_told_until_the_last_moment(sockets: SlotSockets) -> None:
    heard: list[Refreshed] = []
    async with paired(sockets, on_refreshed=heard.append) as pair:
        await pair.agent.hello()
        await pair.link.wait_hello(5)
        first, last = Refreshed(".a/auth.json", b'{"a": 1}'), Refreshed(".a/auth.json", b"x" * MAX_CREDENTIAL_FILE)
        await pair.agent.send(first)
        stopping = asyncio.create_task(pair.link.stop(5))
        assert isinstance(await pair.agent.receive(), Stop)
        await pair.agent.send(last)
        pair.agent.close()
        await soon(stopping)
        assert heard == [first, last]
        assert pair.link.violations == 0


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
