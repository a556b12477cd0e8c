"""Every forecast ends once, as a hit or in vain, and every arrival is judged once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from broker.session.forecast import Expected
from broker.session.ledger import LEAST_FAITH, REMEMBERED, Ledger, Outcome


def told(user: str = "ann", end: float = 200.0) -> Expected:
    return Expected(user, 100.0, end, 0.8, "hour_of_week")


def test_who_comes_while_expected_is_a_hit() -> None:
    ledger = Ledger()
    ledger.expect(told(), 90)
    assert ledger.open_for("ann") == (90, 200)
    assert ledger.arrived("ann", 150) == Outcome("ann", "hit", 150, 90, 60, "hour_of_week")
    assert ledger.open_for("ann") is None
    assert ledger.sweep(500) == []
    assert ledger.counts == {"hit": 1, "miss": 0, "wasted": 0}


def test_who_does_not_come_is_waste_until_the_end_of_the_window() -> None:
    ledger = Ledger()
    ledger.expect(told(), 90)
    assert ledger.sweep(200) == []
    assert ledger.sweep(260) == [Outcome("ann", "wasted", 200, 90, 110, "hour_of_week")]
    assert "ann" not in ledger


def test_who_comes_too_late_is_waste_and_a_miss() -> None:
    ledger = Ledger()
    ledger.expect(told(), 90)
    assert ledger.arrived("ann", 201) == Outcome("ann", "miss", 201, 201, 0, "")
    assert ledger.counts == {"hit": 0, "miss": 1, "wasted": 1}


def test_who_came_before_it_was_said_was_not_expected() -> None:
    ledger = Ledger()
    ledger.expect(told(), 90)
    outcome = ledger.arrived("ann", 89)
    assert outcome is not None
    assert outcome.result == "miss"
    assert "ann" not in ledger
    assert ledger.counts["wasted"] == 0


def test_an_arrival_is_known_to_the_second() -> None:
    ledger = Ledger()
    ledger.expect(told(), 90.7)
    outcome = ledger.arrived("ann", 90.0)
    assert outcome is not None
    assert (outcome.result, outcome.ready_s) == ("hit", 0)


def test_who_had_a_sandbox_needed_no_forecast() -> None:
    ledger = Ledger()
    assert ledger.arrived("ann", 10, up=True) is None
    ledger.expect(told(), 90)
    assert ledger.arrived("ann", 150, up=True) is not None
    assert ledger.counts == {"hit": 1, "miss": 0, "wasted": 0}


def test_a_forecast_said_again_keeps_its_beginning() -> None:
    ledger = Ledger()
    ledger.expect(told(), 90)
    ledger.expect(told(end=300), 150)
    assert ledger.open_for("ann") == (90, 300)


def test_faith_is_lost_by_halves_and_regained_at_once() -> None:
    ledger = Ledger()
    for wrong in (0.5, 0.25):
        ledger.expect(told(), 90)
        ledger.sweep(201)
        assert ledger.faith("ann") == wrong
    assert ledger.faith("bob") == 1
    ledger.only(["ann"])
    assert ledger.faith("ann") == 0.25
    ledger.expect(told(), 90)
    ledger.arrived("ann", 100)
    assert ledger.faith("ann") == 1
    for _ in range(20):
        ledger.expect(told(), 90)
        ledger.sweep(201)
    assert ledger.faith("ann") == LEAST_FAITH
    ledger.expect(told(), 90)
    ledger.only([])
    assert ledger.faith("ann") == 1
    assert "ann" not in ledger
    assert ledger.counts["wasted"] == 22
    assert ledger.ready_s == {"hit": 10, "miss": 0, "wasted": 22 * 110}


def test_a_forecast_that_was_taken_back_is_not_judged() -> None:
    ledger = Ledger()
    ledger.expect(told(), 90)
    ledger.withdraw("ann")
    ledger.withdraw("bob")
    assert ledger.sweep(1000) == []
    assert ledger.faith("ann") == 1


def test_a_user_is_forgotten_whole() -> None:
    ledger = Ledger()
    for user in ("ann", "bob"):
        ledger.arrived(user, 1)
        ledger.expect(told(user), 90)
    ledger.forget("ann")
    assert ledger.open_for("ann") is None
    assert [outcome.user for outcome in ledger.recent] == ["bob"]
    assert "bob" in ledger


EVENTS = st.lists(
    st.tuples(st.sampled_from(["expect", "arrive", "up", "sweep"]), st.sampled_from("ab"), st.integers(0, 60)),
    max_size=60,
)


@given(EVENTS)
def test_every_forecast_ends_once(events: list[tuple[str, str, int]]) -> None:
    ledger, now, opened, arrivals, dropped = Ledger(), 0.0, 0, 0, 0
    for what, user, step in events:
        now += step
        if what == "expect":
            opened += user not in ledger
            ledger.expect(Expected(user, now, now + 50, 0.5, "histogram"), now)
        elif what == "sweep":
            ledger.sweep(now)
        else:
            arrivals += 1
            dropped += ledger.arrived(user, now, up=what == "up") is None
    counts, still = ledger.counts, sum(user in ledger for user in "ab")
    assert counts["hit"] + counts["wasted"] + still == opened
    assert counts["hit"] + counts["miss"] + dropped == arrivals
    assert len(ledger.recent) == min(REMEMBERED, sum(counts.values()))
    assert all(outcome.ready_s >= 0 for outcome in ledger.recent)
    assert all(LEAST_FAITH <= ledger.faith(user) <= 1 for user in "ab")
