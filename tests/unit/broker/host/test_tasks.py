from __future__ import annotations

import asyncio
from typing import Any

import pytest

from broker.host.tasks import TaskOwner, first_of, together


async def give(value: Any, turns: int = 1) -> Any:
    for _ in range(turns):
        await asyncio.sleep(0)
    if isinstance(value, BaseException):
        raise value
    return value


class Never:
    """Waits for ever and notes that it was cancelled."""

    def __init__(self) -> None:
        self.began = asyncio.Event()
        self.cancelled = False

    async def wait(self) -> None:
        self.began.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise


async def test_tasks_are_named_counted_and_forgotten() -> None:
    owner = TaskOwner("me")
    task = owner.start(give(3), "three")
    assert task.get_name() == "me.three"
    assert len(owner) == 1
    assert await task == 3
    await asyncio.sleep(0)
    assert len(owner) == 0
    await owner.close()


async def test_closing_cancels_and_waits() -> None:
    owner, never = TaskOwner("me"), Never()
    owner.start(never.wait(), "never")
    await never.began.wait()
    await owner.close()
    assert never.cancelled
    assert len(owner) == 0


async def test_nothing_starts_after_closing() -> None:
    owner = TaskOwner("me")
    await owner.close()
    with pytest.raises(RuntimeError, match="closed"):
        owner.start(give(1), "late")


async def test_a_task_may_close_its_own_owner() -> None:
    owner, never = TaskOwner("me"), Never()
    owner.start(never.wait(), "never")
    await asyncio.wait_for(owner.start(owner.close(), "closer"), 2)
    assert never.cancelled


async def test_a_task_that_does_not_end_holds_nobody() -> None:
    owner = TaskOwner("me")
    gate = asyncio.Event()

    async def stubborn() -> None:
        while not gate.is_set():
            try:
                await gate.wait()
            except asyncio.CancelledError:
                continue

    task = owner.start(stubborn(), "stubborn")
    await asyncio.sleep(0)
    await asyncio.wait_for(owner.close(timeout=0.05), 2)
    assert not task.done()
    gate.set()
    await task


async def test_a_crash_is_heard_or_logged(capsys: pytest.CaptureFixture[str]) -> None:
    owner = TaskOwner("me")
    heard: list[BaseException] = []
    error = ValueError("x")
    with pytest.raises(ValueError):
        await owner.start(give(error), "told", on_error=heard.append)
    await asyncio.sleep(0)
    assert heard == [error]
    assert "task_failed" not in capsys.readouterr().out
    with pytest.raises(ValueError):
        await owner.start(give(error), "logged")
    await asyncio.sleep(0)
    out = capsys.readouterr().out
    assert "task_failed" in out
    assert "me.logged" in out


async def test_together_gives_all_results() -> None:
    assert await together(give(1, 3), give("two"), give(None)) == (1, "two", None)


async def test_together_raises_the_first_error_and_cancels_the_others() -> None:
    never = Never()
    with pytest.raises(ValueError, match="bad"):
        await together(never.wait(), give(ValueError("bad"), 3), give(1))
    assert never.cancelled


async def test_together_can_be_cancelled() -> None:
    one, two = Never(), Never()
    task = asyncio.ensure_future(together(one.wait(), two.wait(), give(1)))
    await one.began.wait()
    await two.began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (one.cancelled, two.cancelled) == (True, True)


@pytest.mark.parametrize("swapped", [False, True])
async def test_first_of_cancels_the_one_that_is_not_done(swapped: bool) -> None:
    never = Never()
    pair = (give(7, 3), never.wait())
    result = await first_of(*(reversed(pair) if swapped else pair))
    assert result == ((None, 7) if swapped else (7, None))
    assert never.cancelled


async def test_first_of_gives_both_when_both_have_ended() -> None:
    assert await first_of(give(1), give(2)) == (1, 2)


@pytest.mark.parametrize("swapped", [False, True])
async def test_first_of_raises_what_the_first_to_end_raises(swapped: bool) -> None:
    never = Never()
    pair = (give(ValueError("bad"), 3), never.wait())
    with pytest.raises(ValueError, match="bad"):
        await first_of(*(reversed(pair) if swapped else pair))
    assert never.cancelled


async def test_first_of_can_be_cancelled() -> None:
    one, two = Never(), Never()
    task = asyncio.ensure_future(first_of(one.wait(), two.wait()))
    await one.began.wait()
    await two.began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (one.cancelled, two.cancelled) == (True, True)
