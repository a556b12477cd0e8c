from __future__ import annotations

import asyncio

import pytest

from broker.errors import Code, CortexError
from broker.session.clients import Clients


class Client:
    def __init__(self, connection: str) -> None:
        self.connection = connection
        self.held = False
        self.closed: list[tuple[int, str]] = []

    def hold(self) -> None:
        self.held = True

    def release(self) -> None:
        self.held = False

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
