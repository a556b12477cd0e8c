"""The gateway's records on their way to the broker: none lost, in order, however links come and go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from broker.gateway.messages import MAX_PACKET, pack
from broker.gateway.records import Record, from_wire, to_wire
from broker.gateway.usage_log import AGAIN_S, BATCH, EVERY_S, MAX_KEPT, WINDOW, UsageLog


def record(**changes: Any) -> Record:
    base: dict[str, Any] = {"provider": "p", "user": "ann", "endpoint": "generate", "status": 200, "outcome": "ok"}
    return Record(**{"at": 5.0, "duration_s": 1.0, **base, **changes})


class Timer:
    def __init__(self, at: float, call: Callable[[], None]) -> None:
        self.at, self.call, self.off = at, call, False

    def cancel(self) -> None:
        self.off = True


class Broker:
    """The other side: a link that may be away, and what it brought."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timers: list[Timer] = []
        self.up = True
        self.heard: list[dict[str, Any]] = []
        self.log = UsageLog(self.send, self.call_later)

    def send(self, facts: dict[str, Any]) -> bool:
        if self.up:
            self.heard.append(facts)
        return self.up

    def call_later(self, delay: float, call: Callable[[], None]) -> Timer:
        timer = Timer(self.now + delay, call)
        self.timers.append(timer)
        return timer

    def pass_time(self, seconds: float) -> None:
        until = self.now + seconds
        while due := [timer for timer in self.timers if timer.at <= until and not timer.off]:
            timer = min(due, key=lambda each: each.at)
            self.timers.remove(timer)
            self.now = timer.at
            timer.call()
        self.now = until

    def ids(self) -> list[str]:
        return [found["id"] for facts in self.heard for found in facts["records"]]

    def see(self, report: dict[str, Any]) -> None:
        self.log.seen(report["boot"], report["upto"])


def test_records_are_told_together_after_a_moment() -> None:
    broker = Broker()
    for _ in range(3):
        broker.log.add(record())
    assert broker.heard == []
    broker.pass_time(EVERY_S)
    (report,) = broker.heard
    assert (report["kind"], report["boot"], report["upto"]) == ("usage", broker.log.boot, 3)
    assert broker.ids() == [f"{broker.log.boot}-{number}" for number in (1, 2, 3)]
    broker.see(report)
    assert len(broker.log) == 0
    broker.pass_time(10 * AGAIN_S)
    assert len(broker.heard) == 1


def test_many_are_told_at_once_and_no_more_than_a_window_is_under_way() -> None:
    broker = Broker()
    for _ in range(WINDOW + 5):
        broker.log.add(record())
    assert [len(report["records"]) for report in broker.heard] == [BATCH] * (WINDOW // BATCH)
    broker.pass_time(EVERY_S)
    assert len(broker.ids()) == WINDOW
    broker.see(broker.heard[0])
    assert len(broker.ids()) == WINDOW + 5


def test_what_the_broker_did_not_store_is_told_again() -> None:
    broker = Broker()
    broker.log.add(record())
    broker.pass_time(EVERY_S + AGAIN_S)
    assert len(set(broker.ids())) == 1
    assert len(broker.heard) == 2
    broker.log.seen("another", 1)
    assert len(broker.log) == 1


def test_a_new_broker_is_told_what_the_last_one_did_not_answer() -> None:
    broker = Broker()
    for _ in range(2 * BATCH):
        broker.log.add(record())
    broker.see(broker.heard[0])
    broker.up = False
    broker.log.add(record())
    broker.pass_time(60)
    broker.up = True
    broker.heard.clear()
    broker.log.linked()
    assert [name.split("-")[1] for name in broker.ids()] == [str(number) for number in range(BATCH + 1, 2 * BATCH + 2)]


def test_the_oldest_make_room_when_no_broker_comes() -> None:
    broker = Broker()
    broker.up = False
    for _ in range(MAX_KEPT + 3):
        broker.log.add(record())
    assert (len(broker.log), broker.log.lost) == (MAX_KEPT, 3)
    broker.up = True
    broker.log.linked()
    assert broker.ids()[0].endswith("-4")


def test_told_records_may_be_among_those_that_make_room() -> None:
    broker = Broker()
    for _ in range(MAX_KEPT + WINDOW + 50):
        broker.log.add(record())
    assert broker.log.lost == WINDOW + 50
    for _ in range(2 * MAX_KEPT // WINDOW):
        for report in broker.heard:
            broker.see(report)
    assert len(broker.log) == 0
    told = [int(name.split("-")[1]) for name in broker.ids()]
    assert set(range(WINDOW + 51, MAX_KEPT + WINDOW + 51)) <= set(told)
    assert told == sorted(set(told))


def test_the_largest_batch_fits_into_a_packet() -> None:
    broker = Broker()
    long = "u" * 128
    for _ in range(BATCH):
        broker.log.add(
            record(
                user=long, team=long, workspace=long, agent="a" * 64, provider="p" * 64, model="\x01" * 100, at=1e9 / 3
            )
        )
    assert len(pack({"type": "report", **broker.heard[0]})) < MAX_PACKET


def test_close_tells_what_is_left() -> None:
    broker = Broker()
    broker.log.add(record())
    broker.log.close()
    assert len(broker.ids()) == 1
    assert all(timer.off for timer in broker.timers)


@given(
    st.builds(
        record, input=st.none() | st.integers(0, 2**53), ttft_s=st.none() | st.floats(0, 9), status=st.integers(0, 599)
    )
)
def test_a_record_survives_the_link(one: Record) -> None:
    assert from_wire({**to_wire(one), "of a later version": 1}) == one


@pytest.mark.parametrize("found", [{}, {"at": "x"}, {**to_wire(record()), "outcome": "?"}])
def test_what_is_no_record_is_refused(found: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        from_wire(found)


class Links(RuleBasedStateMachine):
    """A link that comes and goes, a broker that answers late or never: in the end all are stored, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.broker = Broker()
        self.added = 0
        self.stored: set[str] = set()

    @rule(count=st.integers(1, 150))
    def add(self, count: int) -> None:
        for _ in range(count):
            self.broker.log.add(record())
        self.added += count

    @rule()
    def lose(self) -> None:
        self.broker.up = False

    @rule()
    def link(self) -> None:
        self.broker.up = True
        self.broker.log.linked()

    @rule(seconds=st.sampled_from([0.1, 1.0, 20.0]))
    def wait(self, seconds: float) -> None:
        self.broker.pass_time(seconds)

    @rule(answer=st.booleans())
    def store(self, answer: bool) -> None:
        for report in self.broker.heard:
            self.stored |= {found["id"] for found in report["records"]}
            if answer and self.broker.up:
                self.broker.see(report)
        self.broker.heard.clear()

    @invariant()
    def kept_until_stored(self) -> None:
        kept = {one.id for one in self.broker.log._kept}
        assert kept | self.stored == {f"{self.broker.log.boot}-{number}" for number in range(1, self.added + 1)}

    def teardown(self) -> None:
        self.link()
        for _ in range(self.added // WINDOW + 3):
            self.wait(1.0)
            self.store(True)
        assert len(self.stored) == self.added
        assert len(self.broker.log) == 0


TestLinks = Links.TestCase
