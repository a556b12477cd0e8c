"""Dialling: only addresses that passed are connected to, in time, whatever the name server says."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest

from broker.errors import Code, CortexError
from broker.gateway import resolve
from broker.gateway.dialer import Dialer
from broker.gateway.resolve import Resolver
from broker.gateway.routes import Origin
from broker.host.tasks import TaskOwner


class Names:
    """A name server that says what it is told to."""

    def __init__(self) -> None:
        self.answers: dict[str, list[str]] = {}
        self.asked: list[str] = []
        self.hang: threading.Event | None = None

    def __call__(self, host: str) -> list[str]:
        self.asked.append(host)
        if self.hang is not None:
            self.hang.wait(10)
        if host not in self.answers:
            raise OSError("not found")
        return self.answers[host]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    made = Names()
    monkeypatch.setattr(resolve, "_getaddrinfo", made)
    return made


@pytest.fixture
async def resolver(names: Names) -> AsyncIterator[Resolver]:
    tasks = TaskOwner("test")
    made = Resolver(tasks, lambda: 0.2)
    yield made
    made.close()
    await tasks.close()


@pytest.fixture
async def port() -> AsyncIterator[int]:
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()


def origin(host: str, port: int, *, private: bool) -> Origin:
    return Origin("tcp", host, port, "", private)


async def test_private_addresses_are_skipped_or_refused(names: Names, resolver: Resolver, port: int) -> None:
    dialer = Dialer(resolver, lambda: 2.0)
    names.answers = {"h": ["169.254.169.254", "127.0.0.1"]}
    with pytest.raises(CortexError) as caught:
        await dialer.dial(origin("h", port, private=False), asyncio.Protocol)
    assert caught.value.code is Code.EGRESS_ADDRESS
    await dialer.dial(origin("h", port, private=True), asyncio.Protocol)


async def test_the_next_address_is_tried(names: Names, resolver: Resolver, port: int) -> None:
    names.answers = {"h": ["::1", "127.0.0.1"]}
    await Dialer(resolver, lambda: 2.0).dial(origin("h", port, private=True), asyncio.Protocol)


async def test_a_name_that_flips_after_the_check_does_not_matter(names: Names, resolver: Resolver, port: int) -> None:
    """What is connected to is an address that was judged, never the name again."""
    names.answers = {"h": ["8.8.8.8"]}
    dialer = Dialer(resolver, lambda: 0.05)
    with pytest.raises(CortexError) as caught:
        await dialer.dial(origin("h", port, private=False), asyncio.Protocol)
    assert caught.value.code is Code.UPSTREAM_UNREACHABLE
    assert names.asked == ["h"]


async def test_a_name_server_that_hangs_is_not_waited_for(names: Names, resolver: Resolver) -> None:
    names.hang = threading.Event()
    try:
        with pytest.raises(CortexError) as caught:
            await resolver.addresses("h")
        assert caught.value.code is Code.UPSTREAM_UNREACHABLE
        with pytest.raises(CortexError):
            await resolver.addresses("h")
        assert names.asked == ["h"]
    finally:
        names.hang.set()


async def test_one_look_up_for_many_and_an_answer_is_kept(names: Names, resolver: Resolver) -> None:
    names.answers = {"h": ["1.2.3.4"]}
    found = await asyncio.gather(*(resolver.addresses("h") for _ in range(20)))
    assert found == [["1.2.3.4"]] * 20
    assert await resolver.addresses("h") == ["1.2.3.4"]
    assert names.asked == ["h"]


async def test_a_failure_is_not_kept(names: Names, resolver: Resolver) -> None:
    with pytest.raises(CortexError):
        await resolver.addresses("h")
    names.answers = {"h": ["1.2.3.4"]}
    assert await resolver.addresses("h") == ["1.2.3.4"]


async def test_look_ups_at_once_are_bounded(names: Names, resolver: Resolver) -> None:
    names.hang = threading.Event()
    try:
        asked = [asyncio.ensure_future(resolver.addresses(f"h{n}")) for n in range(resolve.MAX_LOOKUPS)]
        await asyncio.sleep(0)
        with pytest.raises(CortexError, match="too many"):
            await resolver.addresses("one-more")
        results = await asyncio.gather(*asked, return_exceptions=True)
        assert all(isinstance(result, CortexError) for result in results)
    finally:
        names.hang.set()


async def test_a_ca_that_is_none(names: Names, resolver: Resolver, port: int) -> None:
    names.answers = {"h": ["127.0.0.1"]}
    with pytest.raises(CortexError, match="CA bundle"):
        await Dialer(resolver, lambda: 2.0).dial(Origin("https", "h", port, "nonsense", True), asyncio.Protocol)


async def test_an_old_answer_will_do_where_there_is_no_new_one(
    names: Names, resolver: Resolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolve, "TTL_S", 0.0)
    names.answers = {"h": ["8.8.8.8"]}
    assert await resolver.addresses("h") == ["8.8.8.8"]
    names.answers = {}
    assert await resolver.addresses("h") == ["8.8.8.8"]
    assert names.asked == ["h", "h"], "a new one was asked for"
    monkeypatch.setattr(resolve, "STALE_S", 0.0)
    with pytest.raises(CortexError):
        await resolver.addresses("h")


@pytest.mark.parametrize(
    ("private", "pooled", "reaches"), [(True, True, True), (True, False, False), (False, True, False)]
)
async def test_names_of_guests_hold_up_no_operators_provider(
    names: Names, port: int, private: bool, pooled: bool, reaches: bool
) -> None:
    tasks = TaskOwner("test")
    ours, theirs = Resolver(tasks, lambda: 2.0), Resolver(tasks, lambda: 0.05)
    names.answers = {"h": ["127.0.0.1"]}
    hanging = names.hang = threading.Event()
    try:
        slow = [asyncio.ensure_future(theirs.addresses(f"slow{number}")) for number in range(resolve.MAX_LOOKUPS)]
        await asyncio.wait(slow)
        names.hang = None
        dialling = Dialer(ours, lambda: 2.0, theirs).dial(
            Origin("tcp", "h", port, "", private, pooled), asyncio.Protocol
        )
        if reaches:
            await dialling
        else:
            with pytest.raises(CortexError) as caught:
                await dialling
            assert caught.value.code is Code.UPSTREAM_UNREACHABLE
        hanging.set()
    finally:
        for look_up in slow:
            look_up.exception()
        ours.close()
        theirs.close()
        await tasks.close()


async def answered(resolver: Resolver, host: str, addresses: list[str]) -> None:
    async with asyncio.timeout(5):
        while await resolver.addresses(host) != addresses:
            await asyncio.sleep(0.001)


@pytest.fixture
async def stale(names: Names, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Resolver]:
    """One for operators' names, whose answers are past their time at once."""
    monkeypatch.setattr(resolve, "TTL_S", 0.0)
    monkeypatch.setattr(resolve, "RENEW_S", 0.0)
    tasks = TaskOwner("test")
    made = Resolver(tasks, lambda: 0.2, serve_stale=True)
    yield made
    if names.hang is not None:
        names.hang.set()
    made.close()
    await tasks.close()


async def test_operators_names_are_served_past_their_time_and_renewed_behind(names: Names, stale: Resolver) -> None:
    names.answers = {"h": ["8.8.8.8"]}
    assert await stale.addresses("h") == ["8.8.8.8"]
    names.answers = {"h": ["9.9.9.9"]}
    names.hang = threading.Event()
    assert await stale.addresses("h") == ["8.8.8.8"], "it does not wait for the name server"
    assert await stale.addresses("h") == ["8.8.8.8"]
    names.hang.set()
    await answered(stale, "h", ["9.9.9.9"])


async def test_a_name_server_that_fails_is_not_asked_all_the_time(
    names: Names, stale: Resolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    names.answers = {"h": ["8.8.8.8"]}
    await stale.addresses("h")
    monkeypatch.setattr(resolve, "RENEW_S", 100.0)
    names.answers = {}
    for _ in range(10):
        assert await stale.addresses("h") == ["8.8.8.8"]
        await asyncio.sleep(0)
    async with asyncio.timeout(5):
        while len(names.asked) < 2:
            await asyncio.sleep(0.001)
        while stale._pending:
            await asyncio.sleep(0.001)
    await stale.addresses("h")
    assert not stale._pending


async def test_an_answer_is_not_served_for_ever(names: Names, stale: Resolver, monkeypatch: pytest.MonkeyPatch) -> None:
    names.answers = {"h": ["8.8.8.8"]}
    await stale.addresses("h")
    names.answers = {}
    monkeypatch.setattr(resolve, "STALE_S", 0.0)
    with pytest.raises(CortexError):
        await stale.addresses("h")


async def test_a_server_that_moved_is_found_in_the_same_dial(names: Names, stale: Resolver, port: int) -> None:
    dialer = Dialer(stale, lambda: 2.0)
    names.answers = {"h": ["127.0.0.2"]}
    await stale.addresses("h")
    names.answers = {"h": ["127.0.0.1"]}
    await dialer.dial(origin("h", port, private=True), asyncio.Protocol)


async def test_where_nothing_newer_is_known_the_first_error_counts(names: Names, stale: Resolver, port: int) -> None:
    dialer = Dialer(stale, lambda: 2.0)
    names.answers = {"h": ["127.0.0.2"]}
    await stale.addresses("h")
    for answers in ({}, dict(names.answers)):
        names.answers = answers
        with pytest.raises(CortexError) as caught:
            await dialer.dial(origin("h", port, private=True), asyncio.Protocol)
        assert caught.value.cause == "connection refused"


@pytest.mark.parametrize("serve_stale", [True, False])
async def test_a_name_that_turns_private_is_refused(
    names: Names, monkeypatch: pytest.MonkeyPatch, port: int, serve_stale: bool
) -> None:
    """Rebinding: public while it is judged for a list, the machine's own network when it is dialled. Where the old
    answer is still being served, it is the one connected to; the new one never is."""
    monkeypatch.setattr(resolve, "TTL_S", 0.0)
    tasks = TaskOwner("test")
    resolver = Resolver(tasks, lambda: 2.0, serve_stale=serve_stale)
    dialer = Dialer(resolver, lambda: 0.1)
    names.answers = {"h": ["192.0.2.1", "8.8.8.8"]}
    await resolver.addresses("h")
    names.answers = {"h": ["127.0.0.1"]}
    made: list[asyncio.Protocol] = []

    def factory() -> asyncio.Protocol:
        made.append(asyncio.Protocol())
        return made[-1]

    async with asyncio.timeout(5):
        while True:
            with pytest.raises(CortexError) as caught:
                await dialer.dial(origin("h", port, private=False), factory)
            if caught.value.code is Code.EGRESS_ADDRESS:
                break
            assert serve_stale
    assert len(made) <= 1, "8.8.8.8 at most"
    resolver.close()
    await tasks.close()
