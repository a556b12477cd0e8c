"""Standing wishes: what is told to the next gateway, and that no descriptor is lost."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import Code, CortexError
from broker.gateway.messages import SlotEntry
from broker.gateway.wishes import Wish, Wishes

NO = CortexError(Code.BAD_CONFIG, "no", hint="do not")


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def fds() -> Iterator[tuple[int, int]]:
    pair = os.pipe()
    yield pair
    for fd in pair:
        os.close(fd)


def entry(incarnation: int = 1, slot: str = "a") -> SlotEntry:
    return SlotEntry(slot, incarnation)


async def test_a_change_without_listeners_keeps_those_that_are_held(fds: tuple[int, int]) -> None:
    wishes = Wishes()
    first = wishes.put(entry(), fds)
    second = wishes.put(entry(2), None)
    assert first.fds == second.fds
    assert not set(fds) & set(second.fds or ())
    wishes.heard(second)
    assert first.done.done()
    assert [wish.entry for wish in wishes] == [entry(2)]
    wishes.close()


async def test_a_refused_change_leaves_what_was(fds: tuple[int, int]) -> None:
    before = open_fds()
    wishes = Wishes()
    first = wishes.put(entry(), fds)
    wishes.heard(first)
    second = wishes.put(entry(2), fds)
    wishes.refused(second, NO)
    assert second.done.exception() is NO
    assert list(wishes) == [first]
    assert open_fds() == before + 2
    wishes.close()
    assert open_fds() == before


async def test_a_refused_first_wish_is_gone(fds: tuple[int, int]) -> None:
    before = open_fds()
    wishes = Wishes()
    wishes.refused(wishes.put(entry(), fds), NO)
    assert list(wishes) == []
    assert open_fds() == before


async def test_a_drop_lasts_until_it_is_heard(fds: tuple[int, int]) -> None:
    before = open_fds()
    wishes = Wishes()
    put = wishes.put(entry(), fds)
    drop = wishes.drop("a")
    assert put.done.done()
    assert open_fds() == before
    assert [wish.entry for wish in wishes] == [None]
    wishes.settle_drops()
    assert drop.done.done()
    assert list(wishes) == []


@given(st.lists(st.sampled_from(["put", "change", "drop", "heard", "refused", "old heard", "settle"]), max_size=30))
async def test_no_order_of_events_loses_or_doubles_a_descriptor(events: list[str]) -> None:
    pair = os.pipe()
    before = open_fds()
    wishes = Wishes()
    told: list[Wish] = []
    for number, event in enumerate(events):
        standing = list(wishes)
        if event == "put":
            told.append(wishes.put(entry(number), pair))
        elif event == "change" and standing:
            told.append(wishes.put(entry(number), None))
        elif event == "drop":
            told.append(wishes.drop("a"))
        elif event == "settle":
            wishes.settle_drops()
        elif event == "old heard" and told:
            wishes.heard(told.pop(0))
        elif event in ("heard", "refused") and standing:
            wishes.heard(standing[0]) if event == "heard" else wishes.refused(standing[0], NO)
        for wish in wishes:
            for fd in wish.fds or ():
                os.fstat(fd)
    wishes.close()
    assert open_fds() == before
    for fd in pair:
        os.close(fd)
