from __future__ import annotations

import asyncio
import logging

import pytest

from sandbox_agent.tasks import TaskOwner


async def crash() -> None:
    raise ValueError("boom")


async def test_a_crash_is_logged_or_told_at_once(caplog: pytest.LogCaptureFixture) -> None:
    owner = TaskOwner("owner")
    told: list[BaseException] = []
    with caplog.at_level(logging.ERROR):
        await asyncio.wait([owner.start(crash(), "silent"), owner.start(crash(), "told", on_error=told.append)])
        await asyncio.sleep(0)
    assert [record.getMessage() for record in caplog.records] == ["task owner.silent failed"]
    assert [str(error) for error in told] == ["boom"]
    assert len(owner) == 0


async def test_close_cancels_and_waits_and_nothing_starts_afterwards() -> None:
    owner = TaskOwner("owner")
    task = owner.start(asyncio.Event().wait(), "forever")
    await owner.close()
    assert task.cancelled()
    with pytest.raises(RuntimeError, match="closed"):
        owner.start(crash(), "late")


async def test_a_task_may_close_its_owner() -> None:
    owner = TaskOwner("owner")
    await owner.start(owner.close(), "last")
