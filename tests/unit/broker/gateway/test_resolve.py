"""Look-ups of many sandboxes in few threads: slow names of one are its own trouble. The rest: ``test_dialer``."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest

from broker.errors import Code, CortexError
from broker.gateway import resolve
from broker.gateway.resolve import MAX_OF_ONE, SHARE, THREADS, Resolver
from broker.host.tasks import TaskOwner


class Names:
    """A name server that answers at once, but for names that begin with ``slow``; ``asked``: in this order."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.answer = threading.Event()
        self.came = threading.Semaphore(0)

    def __call__(self, host: str) -> list[str]:
        self.asked.append(host)
        self.came.release()
        if host.startswith("slow"):
            self.answer.wait(20)
        return ["8.8.8.8"]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    made = Names()
    monkeypatch.setattr(resolve, "_getaddrinfo", made)
    return made


@pytest.fixture
async def resolver(names: Names) -> AsyncIterator[Resolver]:
    tasks = TaskOwner("test")
    made = Resolver(tasks, lambda: 5.0)
    yield made
    names.answer.set()
    made.close()
    await tasks.close()


def ask(resolver: Resolver, host: str, whose: str) -> asyncio.Future[list[str]]:
    return asyncio.ensure_future(resolver.addresses(host, whose))


async def fill(resolver: Resolver, names: Names, whose: str, count: int) -> list[asyncio.Future[list[str]]]:
    """Slow names of one; returns when all of its threads are busy."""
    asked = [ask(resolver, f"slow-{whose}-{number}", whose) for number in range(count)]
    for _ in range(min(count, SHARE)):
        assert await asyncio.to_thread(names.came.acquire, timeout=10)
    return asked


async def test_a_sandbox_looks_up_so_many_names_and_is_told(resolver: Resolver, names: Names) -> None:
    slow = await fill(resolver, names, "a", MAX_OF_ONE)
    with pytest.raises(CortexError) as caught:
        await resolver.addresses("one-more", "a")
    assert caught.value.code is Code.EGRESS_LIMIT
    assert "one-more" not in names.asked
    # Those that are under way can be waited for by any number.
    again = ask(resolver, "slow-a-0", "a")
    assert await resolver.addresses("one-more", "b") == ["8.8.8.8"]
    names.answer.set()
    assert await asyncio.gather(*slow, again) == [["8.8.8.8"]] * (MAX_OF_ONE + 1)
    assert await resolver.addresses("another", "a") == ["8.8.8.8"]


async def test_slow_names_of_one_hold_up_no_other(resolver: Resolver, names: Names) -> None:
    slow: list[asyncio.Future[list[str]]] = []
    for whose in range(3):
        slow += await fill(resolver, names, f"bad{whose}", MAX_OF_ONE)
    found = [await resolver.addresses(f"good-{number}", f"s{number}") for number in range(20)]
    assert found == [["8.8.8.8"]] * 20
    assert sum(name.startswith("slow") for name in names.asked) == len(slow) // MAX_OF_ONE * SHARE
    names.answer.set()
    await asyncio.gather(*slow)


async def test_who_wants_a_name_that_waits_in_the_line_of_another_does_not_wait_there(
    resolver: Resolver, names: Names
) -> None:
    slow = await fill(resolver, names, "bad", SHARE)
    behind = ask(resolver, "popular", "bad")
    await asyncio.sleep(0)
    assert "popular" not in names.asked
    assert await resolver.addresses("popular", "good") == ["8.8.8.8"]
    assert await behind == ["8.8.8.8"]
    assert names.asked.count("popular") == 1
    names.answer.set()
    await asyncio.gather(*slow)


async def test_what_nobody_in_particular_asks_may_use_all_threads(resolver: Resolver, names: Names) -> None:
    asked = [ask(resolver, f"slow-{number}", "") for number in range(2 * THREADS)]
    for _ in range(THREADS):
        assert await asyncio.to_thread(names.came.acquire, timeout=10)
    names.answer.set()
    assert await asyncio.gather(*asked) == [["8.8.8.8"]] * 2 * THREADS
    assert len(names.asked) == 2 * THREADS
