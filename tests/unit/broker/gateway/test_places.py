"""Places are taken in turn, never more than there are, and none is lost."""

from __future__ import annotations

import asyncio

import pytest

from broker.gateway import places
from broker.gateway.places import Places
from tests import virtual


def made(most: int, left: list[str] | None = None) -> Places[str]:
    left = [] if left is None else left
    one = Places(left.append)
    one.most = most
    return one


async def waiting(one: Places[str], count: int, timeout_s: float = 10.0) -> list[asyncio.Task[str | None]]:
    tasks = [asyncio.ensure_future(one.wait(timeout_s)) for _ in range(count)]
    await asyncio.sleep(0)
    return tasks


def test_no_bound_unless_set() -> None:
    one = made(0)
    assert all(one.take() for _ in range(1000))


def test_in_turn() -> None:
    async def run() -> None:
        one = made(2)
        assert one.take()
        assert one.take()
        assert not one.take()
        tasks = await waiting(one, 3)
        one.leave()
        await asyncio.sleep(0)
        assert [task.done() for task in tasks] == [True, False, False]
        assert not one.take(), "others wait"
        assert one.hand("thing")
        assert await tasks[1] == "thing"
        assert one.taken == 2, "a thing brings its own place"
        one.most = 3
        one.admit()
        assert await tasks[2] is None
        assert (one.taken, one.waiting) == (3, 0)
        assert not one.hand("thing")

    virtual.run(run())


def test_who_waits_too_long_leaves_the_queue() -> None:
    async def run() -> None:
        one = made(1)
        one.take()
        (first,) = await waiting(one, 1, 1.0)
        (second,) = await waiting(one, 1, 9.0)
        with pytest.raises(TimeoutError):
            await first
        assert one.waiting == 1
        one.leave()
        assert await second is None

    virtual.run(run())


@pytest.mark.parametrize("with_thing", [True, False])
def test_a_turn_that_comes_as_its_waiter_goes_passes_on(with_thing: bool) -> None:
    async def run() -> None:
        one = made(1)
        one.take()
        first, second = await waiting(one, 2)
        if with_thing:
            one.hand("thing")
        else:
            one.leave()
        first.cancel()
        assert await second == ("thing" if with_thing else None)
        assert one.taken == 1

    virtual.run(run())


def test_a_turn_that_nobody_wants_any_more() -> None:
    async def run() -> None:
        left: list[str] = []
        one = made(1, left)
        one.take()
        (first,) = await waiting(one, 1)
        one.hand("thing")
        first.cancel()
        await asyncio.wait([first])
        assert left == ["thing"]
        (first,) = await waiting(one, 1)
        one.leave()
        first.cancel()
        await asyncio.wait([first])
        assert one.taken == 0

    virtual.run(run())


def test_the_queue_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "MAX_WAITING", 2)

    async def run() -> None:
        one = made(1)
        one.take()
        tasks = await waiting(one, 2)
        with pytest.raises(TimeoutError):
            await one.wait(10)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        assert one.waiting == 0

    virtual.run(run())
