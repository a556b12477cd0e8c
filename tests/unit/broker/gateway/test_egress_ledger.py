"""What is told of a way out, and what of an hour is used."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from broker.gateway.egress_ledger import MAX_HOSTS, Hourly, Ledger


def test_what_happened_is_added_up_until_it_is_told() -> None:
    ledger = Ledger()
    assert ledger.decided("a", 1, "denied", "pip")
    assert not ledger.decided("a", 1, "denied")
    assert ledger.decided("a", 1, "allowed")
    ledger.moved("a", 1, 3, 4)
    ledger.moved("b", 2, 0, 0)
    assert ledger.rows() == [
        {"host": "a", "port": 1, "allowed": 1, "denied": 2, "refused_address": 0, "limited": 0}
        | {"sent": 3, "received": 4, "tool": "pip", "last": "allowed"}
    ]
    ledger.clear()
    assert (len(ledger), ledger.rows()) == (0, [])


def test_hosts_are_bounded_and_nothing_is_lost() -> None:
    ledger = Ledger()
    for number in range(MAX_HOSTS + 5):
        ledger.decided(f"h{number}", 443, "denied")
    rows = ledger.rows()
    assert len(rows) == MAX_HOSTS + 1
    assert rows[-1]["host"] == ""
    assert sum(row["denied"] for row in rows) == MAX_HOSTS + 5


def test_an_hour_passes() -> None:
    hourly = Hourly()
    assert hourly.wait(100, 0.0) == 0
    hourly.add(60, 10.0)
    hourly.add(60, 70.0)
    assert hourly.wait(100, 71.0) == 3600 - 71, "when the first minute is an hour old"
    assert hourly.wait(60, 71.0) == 3660 - 71
    assert hourly.wait(1000, 71.0) == 0
    assert hourly.wait(100, 3600.0) == 0
    assert hourly.add(0, 3600.0) == 60
    assert hourly.add(0, 10_000.0) == 0


@given(st.lists(st.tuples(st.integers(0, 1000), st.floats(0, 600)), max_size=60), st.integers(1, 3000))
def test_the_sum_is_that_of_the_last_hour_and_a_wait_is_long_enough(moves: list[tuple[int, float]], limit: int) -> None:
    hourly, now, log = Hourly(), 5.0, []
    for count, pause in moves:
        now += pause
        log.append((now, count))
        total = hourly.add(count, now)
        assert total >= sum(counted for at, counted in log if now - at < 3600 - 60)
        assert total <= sum(counted for at, counted in log if now - at <= 3600)
    wait = hourly.wait(limit, now)
    assert (wait == 0) == (hourly.add(0, now) < limit)
    assert hourly.wait(limit, now + wait) == 0
