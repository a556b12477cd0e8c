"""What calls cost, and who has spent what."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.config_gateway import BudgetsConfig, PriceConfig
from broker.gateway.records import Record
from broker.session.prices import Budgets, cost_of, period, price_of
from tests.unit.broker.gateway.test_usage_log import record

SONNET = PriceConfig(input=3, output=15, cache_read=0.3, cache_write=3.75)


def used(**changes: Any) -> Record:
    return record(**{"input": 1_000_000, "output": 100_000, "cache_read": 600_000, "cache_write": 200_000, **changes})


@pytest.mark.parametrize(
    ("price", "call", "cost"),
    [
        (SONNET, used(), 0.2 * 3 + 0.6 * 0.3 + 0.2 * 3.75 + 1.5),
        (PriceConfig(input=3, output=15), used(), 4.5),
        (SONNET, used(cache_read=None, cache_write=None), 4.5),
        (SONNET, used(input=None, output=None, cache_read=None, cache_write=None), 0),
        (SONNET, used(cached="hit"), 0),
        (SONNET, used(cached="coalesced"), 0),
        (SONNET, used(cached="batched", cache_read=None, cache_write=None), 4.5),
        (None, used(), 0),
    ],
)
def test_each_kind_of_token_has_its_price(price: PriceConfig | None, call: Record, cost: float) -> None:
    assert cost_of(price, call) == pytest.approx(cost)


def test_the_longest_name_that_fits_has_the_price() -> None:
    prices = {key: PriceConfig(input=number) for number, key in enumerate(["*", "a-*", "a-b", "a-b*", "a-b-c*"])}
    found = {model: price_of(prices, model) for model in ("a-b", "a-b-c-d", "a-bc", "a-x", "z", "")}
    assert {model: price.input for model, price in found.items() if price} == {
        "a-b": 2, "a-b-c-d": 4, "a-bc": 3, "a-x": 1, "z": 0, "": 0,
    }  # fmt: skip
    assert price_of({"a": SONNET}, "a-b") is None


def at(year: int, month: int, day: int, hour: int = 0, minute: int = 0) -> float:
    return datetime(year, month, day, hour, minute, tzinfo=UTC).timestamp()


@given(
    st.datetimes(datetime(2001, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC)), st.sampled_from(["day", "month"])
)
def test_a_period_holds_its_time_and_the_next_follows_it(when: datetime, kind: Any) -> None:
    now = when.timestamp()
    begin, end = period(kind, now)
    assert begin <= now < end
    assert period(kind, end)[0] == end
    assert period(kind, begin) == (begin, end)


def test_periods_begin_at_midnight_utc() -> None:
    assert period("day", at(2026, 2, 28, 23, 59)) == (at(2026, 2, 28), at(2026, 3, 1))
    assert period("month", at(2026, 12, 31, 23, 59)) == (at(2026, 12, 1), at(2027, 1, 1))


def test_who_has_spent_what_they_may() -> None:
    budgets = Budgets()
    budgets.load((100.0, 200.0), {"ann": 0.5}, {"red": 1.0})
    budgets.add(150.0, "ann", "red", 0.5)
    budgets.add(150.0, "bob", "", 0.75)
    # Of another period.
    budgets.add(99.0, "bob", "", 5.0)
    budgets.add(200.0, "bob", "", 5.0)

    def over(**limits: float) -> list[list[str]]:
        return [sorted(names) for names in budgets.over(BudgetsConfig.model_validate(limits))]

    assert over() == [[], []]
    assert over(user_usd=1.0, team_usd=2.0) == [["ann"], []]
    assert over(user_usd=0.75, team_usd=1.5) == [["ann", "bob"], ["red"]]
    budgets.forget("ann")
    assert over(user_usd=0.75) == [["bob"], []]
