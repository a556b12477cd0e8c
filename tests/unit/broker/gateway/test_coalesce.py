"""Followers get all that the leader gets, from the beginning, whenever they come; a failure they do not get."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.gateway.cache import Recorded
from broker.gateway.coalesce import Flight, Flights, Joined
from broker.gateway.heads import ResponseHead, parse_response

OK = parse_response(b"HTTP/1.1 200 OK\r\ncontent-type: a/b\r\nset-cookie: x=y\r\ntransfer-encoding: chunked\r\n\r\n")


def head(status: int) -> ResponseHead:
    return parse_response(b"HTTP/1.1 %d X\r\ncontent-length: 2\r\n\r\n" % status)


class Follower:
    """Notes what it hears. ``holds``: asks to be held after the first body."""

    def __init__(self, holds: bool = False) -> None:
        self.heads: list[Recorded] = []
        self.pieces: list[bytes] = []
        self.ends: list[str] = []
        self.joined: Joined | None = None
        self.holds = holds

    def shared_head(self, recorded: Recorded) -> None:
        assert self.joined is not None
        assert not self.ends
        self.heads.append(recorded)

    def shared_body(self, pieces: list[bytes]) -> None:
        assert self.heads
        assert not self.ends
        self.pieces += pieces
        if self.holds and self.joined is not None:
            self.joined.hold(True)

    def shared_end(self) -> None:
        self.ends.append("end")

    def shared_lost(self, why: str) -> None:
        self.ends.append(why)

    def join(self, flights: Flights, key: bytes = b"k") -> Follower:
        self.joined = flights.join(key, self)
        return self


def led(flights: Flights, key: bytes = b"k") -> Flight:
    flight = flights.lead(key)
    assert flight is not None
    return flight


async def settled() -> None:
    """What ``call_soon`` was given has run."""
    done = asyncio.Event()
    asyncio.get_running_loop().call_soon(done.set)
    await done.wait()


@given(st.lists(st.binary(max_size=4), max_size=8), st.lists(st.integers(0, 9), max_size=4), st.integers(0, 3))
def test_whenever_one_comes_all_is_heard(bodies: list[bytes], joins: list[int], held: int) -> None:
    async def run() -> None:
        flights = Flights()
        flight, followers = led(flights), list[Follower]()
        assert flights.lead(b"k") is None
        for at in range(10):
            for _ in range(joins.count(at)):
                followers.append(Follower(holds=len(followers) < held).join(flights))
            if at == 0:
                flight.head(OK)
            elif at <= len(bodies):
                flight.body([bodies[at - 1]])
            await settled() if at % 2 else None
        assert flight.followers == len(joins)
        flight.end()
        for each in followers:
            each.holds = False
            assert each.joined is not None
            each.joined.hold(False)
            assert b"".join(each.pieces) == b"".join(bodies)
            assert each.ends == ["end"]
            assert [answer.headers for answer in each.heads] == [
                [(b"content-type", b"a/b"), (b"x-cortex-cache", b"coalesced")]
            ]
        assert (flight.followers, len(flights), flights.size) == (0, 0, 0)

    asyncio.run(run())


async def test_pieces_pass_as_they_come() -> None:
    flights = Flights()
    flight, follower = led(flights), Follower().join(flights)
    flight.head(OK)
    for number in range(3):
        flight.body([b"%d" % number])
        assert follower.pieces == [b"%d" % each for each in range(number + 1)]


@pytest.mark.parametrize("status", [204, 302, 400, 429, 500])
async def test_an_error_answer_is_the_leaders_alone(status: int) -> None:
    flights = Flights()
    flight, follower = led(flights), Follower().join(flights)
    flight.head(head(status))
    flight.body([b"xx"])
    flight.end()
    assert not follower.heads
    assert follower.ends == [f"the shared call was answered {status}"]
    assert led(flights) is not flight


async def test_followers_hear_of_a_loss_and_may_lead_at_once() -> None:
    flights = Flights()

    class Eager(Follower):
        def shared_lost(self, why: str) -> None:
            super().shared_lost(why)
            self.flight = flights.lead(b"k")

    flight, one, two = led(flights), Eager(), Eager()
    one.join(flights)
    two.join(flights)
    flight.head(OK)
    flight.body([b"a"])
    flight.lost("cut")
    flight.end()
    flight.body([b"b"])
    assert [one.ends, two.ends] == [["cut"], ["cut"]]
    assert one.pieces == [b"a"]
    assert one.flight is not None
    assert two.flight is None


async def test_the_leader_hears_when_the_last_follower_has_left() -> None:
    flights = Flights()
    flight, one, two = led(flights), Follower().join(flights), Follower().join(flights)
    left: list[int] = []
    flight.deserted = lambda: left.append(flight.followers)
    assert one.joined is not None
    assert two.joined is not None
    one.joined.cancel()
    one.joined.cancel()
    assert (flight.followers, left) == (1, [])
    two.joined.cancel()
    assert (flight.followers, left) == (0, [0])
    stays = Follower().join(flights)
    flight.head(OK)
    flight.end()
    await settled()
    assert (one.heads, one.ends, stays.ends) == ([], [], ["end"])
    assert left == [0]


async def test_a_large_answer_is_kept_for_nobody_and_the_slow_are_lost() -> None:
    flights = Flights(max_bytes=10)
    flight, fast, slow = led(flights), Follower().join(flights), Follower(holds=True).join(flights)
    flight.head(OK)
    flight.body([b"12345"])
    flight.body([b"6789"])
    assert flights.size == 9
    assert slow.pieces == [b"12345"]
    flight.body([b"abc"])
    assert (flights.size, len(flights)) == (0, 0)
    assert b"".join(fast.pieces) == b"123456789abc"
    assert slow.ends == ["the shared answer grew too large"]
    other = led(flights)
    assert other is not flight
    flight.body([b"d"])
    flight.end()
    assert b"".join(fast.pieces) == b"123456789abcd"
    assert fast.ends == ["end"]
    assert flights.lead(b"k") is None


async def test_who_is_held_later_is_lost_with_the_next_piece_not_before() -> None:
    flights = Flights(max_bytes=2)
    flight, follower = led(flights), Follower().join(flights)
    flight.head(OK)
    flight.body([b"123"])
    assert follower.joined is not None
    follower.joined.hold(True)
    assert not follower.ends
    follower.joined.hold(False)
    flight.body([b"4"])
    follower.joined.hold(True)
    flight.body([b"5"])
    assert follower.pieces == [b"123", b"4"]
    assert len(follower.ends) == 1


async def test_all_answers_together_are_bounded() -> None:
    flights = Flights(max_bytes=10, max_total=15)
    one, two = led(flights, b"1"), led(flights, b"2")
    for flight in (one, two):
        flight.head(OK)
        flight.body([bytes(9)])
    assert flights.size == 9
    assert len(flights) == 1
    one.lost("cut")
    two.end()
    assert flights.size == 0


async def test_one_who_leaves_in_the_midst_of_a_piece_hears_no_end() -> None:
    flights = Flights()

    class Leaver(Follower):
        def shared_body(self, pieces: list[bytes]) -> None:
            super().shared_body(pieces)
            assert self.joined is not None
            self.joined.cancel()

    flight, leaver, stays = led(flights), Leaver(), Follower()
    leaver.join(flights)
    stays.join(flights)
    flight.head(OK)
    flight.body([b"a"])
    flight.body([b"b"])
    flight.end()
    assert (leaver.pieces, leaver.ends) == ([b"a"], [])
    assert (stays.pieces, stays.ends) == ([b"a", b"b"], ["end"])


async def test_who_has_missed_a_piece_gets_none_after_it() -> None:
    flights = Flights(max_bytes=5)

    class Waker(Follower):
        def shared_body(self, pieces: list[bytes]) -> None:
            super().shared_body(pieces)
            if len(self.pieces) == 3 and slow.joined is not None:
                slow.joined.hold(False)

    flight, waker, slow = led(flights), Waker(), Follower(holds=True)
    waker.join(flights)
    slow.join(flights)
    flight.head(OK)
    for piece in (b"12", b"34", b"56"):
        flight.body([piece])
    assert slow.pieces == [b"12"]
    assert len(slow.ends) == 1
    assert waker.pieces == [b"12", b"34", b"56"]
