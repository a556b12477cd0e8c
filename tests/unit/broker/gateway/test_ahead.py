"""Connections are opened ahead at once, and not over and over where the other side will not have it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from broker.errors import Code, CortexError
from broker.gateway.ahead import MAX_PAUSE_S, Prewarm
from broker.host.tasks import TaskOwner
from tests import virtual


class Side:
    """Idle connections, and a server that takes them or not; ``opened``: when each try was."""

    def __init__(self, count: int = 2) -> None:
        self.idle = 0
        self.opened: list[float] = []
        self.refuses = self.closes = False
        self.made = Prewarm(count, lambda: self.idle < count, self.open_one)

    async def open_one(self) -> None:
        self.opened.append(asyncio.get_running_loop().time())
        await asyncio.sleep(0)
        if self.refuses:
            raise CortexError(Code.UPSTREAM_UNREACHABLE, "no", hint="none")
        if self.closes:
            self.made.lost_unused()
        else:
            self.idle += 1


def live(scenario: Callable[[Side], Coroutine[Any, Any, None]]) -> Side:
    async def run() -> Side:
        side, tasks = Side(), TaskOwner("test")
        side.made.start(tasks)
        await asyncio.sleep(0.1)
        await scenario(side)
        side.made.stop()
        await tasks.close()
        return side

    return virtual.run(run())


def test_at_once_and_again_when_one_was_taken() -> None:
    async def scenario(side: Side) -> None:
        assert side.idle == 2
        side.idle -= 1
        side.made.content()
        await asyncio.sleep(0.1)
        assert side.idle == 2
        await asyncio.sleep(1000)
        assert len(side.opened) == 3

    live(scenario)


@pytest.mark.parametrize("refuses", [True, False])
def test_refusals_are_answered_with_longer_pauses(refuses: bool) -> None:
    """So is a server that closes what it has just accepted."""

    async def scenario(side: Side) -> None:
        side.refuses, side.closes, side.idle = refuses, not refuses, 0
        side.opened.clear()
        side.made.wake()
        await asyncio.sleep(600)
        pauses = [later - earlier for earlier, later in zip(side.opened, side.opened[1:], strict=False)]
        assert 0.5 <= pauses[0] <= 1.0
        assert all(pause <= MAX_PAUSE_S for pause in pauses)
        assert pauses[-1] >= MAX_PAUSE_S / 2
        assert len(side.opened) < 30
        side.refuses = side.closes = False
        await asyncio.sleep(2 * MAX_PAUSE_S)
        assert side.idle == 2

    live(scenario)


def test_a_server_that_closes_what_is_idle_is_not_bothered() -> None:
    async def scenario(side: Side) -> None:
        for _ in range(3600):
            await asyncio.sleep(1)
            side.made.wake()  # as the sweeper does
            if side.idle:
                side.idle = 0
                side.made.lost_unused()
        assert len(side.opened) < 2 * (3600 / MAX_PAUSE_S * 2 + 10)
        await asyncio.sleep(MAX_PAUSE_S)
        assert side.idle == 2
        side.idle = 1
        side.made.content()
        side.made.lost_unused()
        before = asyncio.get_running_loop().time()
        while side.idle < 2:
            await asyncio.sleep(0.1)
        assert asyncio.get_running_loop().time() - before < 1.2, "one was used: pauses begin anew"

    live(scenario)
