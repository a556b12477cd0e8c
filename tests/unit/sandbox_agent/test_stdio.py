from __future__ import annotations

import asyncio
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_agent import stdio
from sandbox_agent.spawn import Child, spawn
from sandbox_agent.stdio import AgentStdio, LineBuffer

ENV = {"PATH": os.environ["PATH"]}


@given(st.lists(st.binary(max_size=12).map(lambda b: b.replace(b"\n", b"")), max_size=8), st.integers(1, 7))
def test_lines_do_not_depend_on_how_the_bytes_arrive(lines: list[bytes], step: int) -> None:
    data = b"".join(line + b"\n" for line in lines)
    buffer = LineBuffer(8)
    got = []
    for start in range(0, len(data), step):
        got += buffer.feed(data[start : start + step])
    assert got == [line for line in lines if 0 < len(line) <= 8]
    assert buffer.dropped == sum(len(line) > 8 for line in lines)


def test_an_endless_line_is_not_kept() -> None:
    buffer = LineBuffer(100)
    for _ in range(1000):
        assert buffer.feed(b"x" * 50) == []
    assert buffer.feed(b"end\nnext\n") == [b"next"]
    assert buffer.dropped == 1


async def _until(condition: object, *, seconds: float = 5.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0.005)


def _stdio(child: Child, lines: list[bytes], hung: list[bool] | None = None) -> AgentStdio:
    stuck = hung if hung is not None else []
    return AgentStdio(child, max_line=2**25, on_lines=lines.extend, on_hung=lambda: stuck.append(True))


async def test_a_message_bigger_than_the_pipe_arrives_whole() -> None:
    lines: list[bytes] = []
    child = spawn(["cat"], ENV, "/")
    channel = _stdio(child, lines)
    big = os.urandom(1_500_000).hex().encode()
    for message in (b"first", big, b"last"):
        channel.write(message + b"\n")
    assert channel.congested
    await _until(lambda: len(lines) == 3)
    assert lines == [b"first", big, b"last"]
    assert not channel.congested
    channel.finish()
    os.waitpid(child.pid, 0)


async def test_writing_to_a_dead_agent_is_no_error() -> None:
    child = spawn(["true"], ENV, "/")
    channel = _stdio(child, [])
    os.waitpid(child.pid, 0)
    for _ in range(3):
        channel.write(b"x" * 100_000)
    channel.finish()
    channel.write(b"after the end")


async def test_an_agent_that_never_reads_is_reported_once(monkeypatch: object) -> None:
    hung: list[bool] = []
    child = spawn(["sleep", "30"], ENV, "/")
    channel = _stdio(child, [], hung)
    piece = b"x" * (stdio.MAX_UNREAD_BYTES // 4)
    for _ in range(6):
        channel.write(piece)
    assert hung == [True]
    channel.finish()
    os.kill(child.pid, 9)
    os.waitpid(child.pid, 0)


async def test_the_end_of_stderr_is_kept_and_the_last_line_is_not_lost() -> None:
    lines: list[bytes] = []
    child = spawn(["sh", "-c", "seq 2000 >&2; echo last words >&2; echo done"], ENV, "/")
    channel = _stdio(child, lines)
    await _until(lambda: channel.last_words.endswith("last words"))
    os.waitpid(child.pid, 0)
    channel.finish()
    assert lines == [b"done"]
    assert len(channel.last_words) <= stdio.STDERR_TAIL


async def test_output_that_is_held_back_waits_in_the_pipe_and_loses_nothing() -> None:
    lines: list[bytes] = []
    child = spawn(["cat"], ENV, "/")
    channel = _stdio(child, lines)
    channel.hold(True)
    channel.hold(True)
    channel.write(b"held\n")
    await asyncio.sleep(0.1)
    assert lines == []
    channel.hold(False)
    await _until(lambda: lines == [b"held"])
    channel.finish()
    channel.hold(True)
    os.waitpid(child.pid, 0)


@pytest.mark.parametrize("closed", ["exec <&-", "exec >&-"])
async def test_an_agent_that_closes_one_end_and_stays_is_reported(closed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stdio, "CLOSED_GRACE_S", 0.05)
    hung: list[bool] = []
    child = spawn(["sh", "-c", f"{closed}; sleep 30"], ENV, "/")
    channel = _stdio(child, [], hung)
    async with asyncio.timeout(5):
        while not hung:
            channel.write(b"anybody there?\n")
            await asyncio.sleep(0.01)
    assert hung == [True]
    channel.finish()
    os.killpg(child.pid, 9)
    os.waitpid(child.pid, 0)


async def test_an_agent_that_ends_is_not_reported_as_half_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stdio, "CLOSED_GRACE_S", 0.05)
    hung: list[bool] = []
    child = spawn(["true"], ENV, "/")
    channel = _stdio(child, [], hung)
    os.waitpid(child.pid, 0)
    channel.write(b"x\n")
    channel.finish()
    await asyncio.sleep(0.1)
    assert hung == []
