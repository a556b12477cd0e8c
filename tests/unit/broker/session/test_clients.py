from __future__ import annotations

import asyncio
from collections.abc import Callable
from math import inf

import pytest

from broker.errors import Code, CortexError
from broker.session.clients import Clients


class Client:
    def __init__(self, connection: str) -> None:
        self.connection = connection
        self.held = False
        self.spoke_at = 1.0
        self.on_speech: Callable[[], None] | None = None
        self.closed: list[tuple[int, str]] = []

    def hold(self, on_speech: Callable[[], None] | None = None) -> None:
        self.held = True
        self.on_speech = on_speech or self.on_speech

    def release(self) -> None:
        self.held = False
        self.on_speech = None

    def notify(self, message: bytes) -> None:
        raise AssertionError("not asked for")

    def close(self, code: int, reason: str) -> None:
        self.closed.append((code, reason))


def test_they_are_counted_and_bounded_by_the_limit_of_now() -> None:
    limit = 1
    clients = Clients(lambda: limit)
    one, two = Client("1"), Client("2")
    clients.add(one)
    with pytest.raises(CortexError) as caught:
        clients.add(two)
    assert caught.value.code is Code.SESSION_BUSY
    assert len(clients) == 1
    limit = 2
    clients.add(two)
    assert len(clients) == 2
    clients.discard(one)
    clients.discard(one)
    assert len(clients) == 1


def test_all_are_closed() -> None:
    clients = Clients(lambda: 9)
    both = Client("1"), Client("2")
    for client in both:
        clients.add(client)
    assert clients.close(1012, "later") == 2
    assert [client.closed for client in both] == [[(1012, "later")]] * 2


async def test_they_are_held_while_it_runs_and_no_longer() -> None:
    clients = Clients(lambda: 9)
    early, late = Client("1"), Client("2")
    clients.add(early)
    with clients.held(10):
        assert early.held
        clients.add(late)
        assert late.held
    assert not early.held
    assert not late.held
    after = Client("3")
    clients.add(after)
    assert not after.held


async def test_they_are_let_go_when_it_fails() -> None:
    clients = Clients(lambda: 9)
    client = Client("1")
    clients.add(client)
    with pytest.raises(ValueError), clients.held(10):
        raise ValueError
    assert not client.held


async def test_nobody_is_held_longer_than_the_bound() -> None:
    clients = Clients(lambda: 9)
    client, late = Client("1"), Client("2")
    clients.add(client)
    with clients.held(0.01):
        async with asyncio.timeout(2):
            while client.held:
                await asyncio.sleep(0.005)
        clients.add(late)
        assert not late.held


async def test_while_the_sandbox_rests_their_first_word_is_heard() -> None:
    clients, heard = Clients(lambda: 9), []
    early, late = Client("1"), Client("2")
    clients.add(early)
    clients.rest(lambda: heard.append(1))
    clients.add(late)
    for client in (early, late):
        assert client.held
        assert client.on_speech is not None
        client.on_speech()
    assert heard == [1, 1]
    with clients.held(10):
        # The bind that follows a pause holds them too, and neither lets go of what the other holds.
        assert early.on_speech is not None
    assert early.held
    with clients.held(10):
        clients.rouse()
        assert early.held
    assert not early.held
    assert not late.held
    clients.rouse()


def test_when_one_of_them_spoke_last() -> None:
    clients = Clients(lambda: 9)
    assert clients.spoke_at == -inf
    one, two = Client("1"), Client("2")
    clients.add(one)
    clients.add(two)
    two.spoke_at = 7.0
    assert clients.spoke_at == 7.0


def test_those_alone_can_be_closed_that_are_served() -> None:
    clients = Clients(lambda: 9)
    served, waiting = Client("1"), Client("2")
    for client in (served, waiting):
        clients.add(client)
    clients.serve("1")
    assert clients.close(1011, "it died", served=True) == 1
    assert (len(served.closed), len(waiting.closed)) == (1, 0)
    clients.discard(served)
    clients.add(served)
    assert clients.close(1011, "it died", served=True) == 0
