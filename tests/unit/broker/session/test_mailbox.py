from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from broker.errors import Code, CortexError
from broker.host.tasks import TaskOwner
from broker.session.mailbox import RESERVED, SIZE, Mailbox


class Actor:
    def __init__(self) -> None:
        self.crashes: list[Exception] = []
        self.box = Mailbox("s_1", self.crashed)
        self.tasks = TaskOwner("test")

    async def crashed(self, error: Exception) -> None:
        self.crashes.append(error)
        if str(error) == "twice":
            raise RuntimeError("and again")

    def start(self) -> None:
        self.tasks.start(self.box.run(), "actor")


@pytest.fixture
async def actor() -> AsyncIterator[Actor]:
    made = Actor()
    yield made
    await made.tasks.close()
    made.box.close()


async def test_commands_are_done_in_order_and_answered(actor: Actor) -> None:
    done: list[int] = []

    async def work(number: int) -> int:
        await asyncio.sleep(0)
        done.append(number)
        return number * 2

    asked = [asyncio.ensure_future(actor.box.ask(lambda n=n: work(n))) for n in range(10)]  # type: ignore[misc]
    actor.start()
    assert await asyncio.gather(*asked) == [n * 2 for n in range(10)]
    assert done == list(range(10))


async def test_an_error_goes_to_who_asked_and_ends_nothing_else(actor: Actor) -> None:
    async def refuse() -> None:
        raise CortexError(Code.SESSION_CONFLICT, "no", hint="stop")

    actor.start()
    with pytest.raises(CortexError) as caught:
        await actor.box.ask(refuse)
    assert caught.value.code is Code.SESSION_CONFLICT
    assert actor.crashes == []


@pytest.mark.parametrize("text", ["once", "twice"])
async def test_a_crash_is_answered_told_and_survived(actor: Actor, text: str) -> None:
    async def crash() -> None:
        raise ZeroDivisionError(text)

    async def fine() -> int:
        return 7

    actor.start()
    with pytest.raises(CortexError) as caught:
        await actor.box.ask(crash)
    assert caught.value.code is Code.INTERNAL
    assert await actor.box.ask(fine) == 7
    assert [str(error) for error in actor.crashes] == [text]


async def test_who_asks_is_bounded_and_own_events_have_places_left(actor: Actor) -> None:
    async def nothing() -> None:
        return None

    asked = [asyncio.ensure_future(actor.box.ask(nothing)) for _ in range(SIZE)]
    await asyncio.sleep(0)
    refused = [task for task in asked if task.done()]
    assert len(refused) == RESERVED
    for task in refused:
        error = task.exception()
        assert isinstance(error, CortexError)
        assert error.code is Code.MAILBOX_FULL
    for _ in range(RESERVED):
        actor.box.post(nothing)
    with pytest.raises(asyncio.QueueFull):
        actor.box.post(nothing)
    actor.start()
    await asyncio.gather(*(task for task in asked if task not in refused))


async def test_events_of_one_name_are_done_once_and_again_when_they_come_later(actor: Actor) -> None:
    done: list[str] = []

    async def one(name: str) -> None:
        done.append(name)
        if len(done) == 1:
            # It may come again from now on, though this one is still being done.
            actor.box.post_once("a", lambda: one("again"))

    for _ in range(1000):
        actor.box.post_once("a", lambda: one("a"))
        actor.box.post_once("b", lambda: one("b"))
    actor.start()
    while not actor.box.idle:
        await asyncio.sleep(0)
    assert done == ["a", "b", "again"]


async def test_it_is_not_idle_while_something_is_done(actor: Actor) -> None:
    gate = asyncio.Event()
    actor.start()
    asked = asyncio.ensure_future(actor.box.ask(gate.wait))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert actor.box._queue.empty()
    assert not actor.box.idle
    gate.set()
    await asked
    await asyncio.sleep(0)
    assert actor.box.idle


async def test_whoever_gives_up_disturbs_nobody(actor: Actor) -> None:
    gate = asyncio.Event()
    asked = asyncio.ensure_future(actor.box.ask(gate.wait))
    await asyncio.sleep(0)
    asked.cancel()
    gate.set()
    actor.start()
    assert await actor.box.ask(gate.wait) is True


async def test_closing_answers_everybody(actor: Actor) -> None:
    actor.start()
    asked = [asyncio.ensure_future(actor.box.ask(asyncio.Event().wait)) for _ in range(3)]
    await asyncio.sleep(0)
    await actor.tasks.close()
    actor.box.close()
    for task in asked:
        with pytest.raises(CortexError) as caught:
            await asyncio.wait_for(task, 1)
        assert caught.value.code is Code.SESSION_STOPPED
    with pytest.raises(CortexError):
        await actor.box.ask(asyncio.Event().wait)
    actor.box.post_once("a", asyncio.Event().wait)  # type: ignore[arg-type]
