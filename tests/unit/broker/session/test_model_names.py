"""Names of models, of which sandboxes can make up as many as they like."""

from __future__ import annotations

from collections import defaultdict

from hypothesis import given
from hypothesis import strategies as st

from broker.session.model_names import HOUR_S, MAX_HOURS, MAX_KNOWN, MAX_OF_USER, OTHER, ModelNames
from tests.unit.broker.gateway.test_usage_log import record


def named(
    names: ModelNames, model: str, status: int = 200, *, at: float = 0.0, user: str = "ann", to: str = "p"
) -> str:
    outcome = "ok" if status == 200 else "error"
    return names.of(record(model=model, status=status, outcome=outcome, at=at, user=user, provider=to))


def test_a_name_that_never_answered_is_none() -> None:
    names = ModelNames()
    assert [named(names, "m", status) for status in (404, 500, 0, 200, 404)] == [OTHER, OTHER, OTHER, "m", "m"]
    assert named(names, "m", 404, to="q") == OTHER, "another provider has not answered by it"
    assert named(names, "", 400) == "", "none was named"
    assert named(ModelNames([("p", "m")]), "m", 404) == "m", "it has before"


def test_where_every_name_is_answered_a_user_has_so_many_an_hour() -> None:
    names = ModelNames()
    found = [named(names, f"m{number}") for number in range(MAX_OF_USER + 5)]
    assert found == [*(f"m{number}" for number in range(MAX_OF_USER)), *[OTHER] * 5]
    assert named(names, "m0") == "m0"
    assert named(names, "new", user="bob") == named(names, "new", at=HOUR_S) == "new"


def test_what_is_known_is_bounded_and_the_latest_stays() -> None:
    names = ModelNames([("p", "old"), ("p", "used")])
    for number in range(MAX_KNOWN - 1):
        if number % 100 == 0:
            named(names, "used", user="carl")
        named(names, f"m{number}", user=f"user{number}")
    assert (named(names, "old", 500), named(names, "used", 500)) == (OTHER, "used")
    assert len(names._known) == MAX_KNOWN


RUNS = st.tuples(st.integers(0, 100), st.integers(1, 60), st.sampled_from([200, 404]), st.integers(0, 5))


@given(st.lists(st.tuples(RUNS, st.sampled_from(["ann", "bob"])), max_size=12))
def test_rows_of_an_hour_are_bounded(runs: list[tuple[tuple[int, int, int, int], str]]) -> None:
    names, rows = ModelNames(), defaultdict[tuple[int, str], set[str]](set)
    for (first, count, status, hour), user in sorted(runs, key=lambda run: run[0][3]):
        for model in range(first, first + count):
            rows[hour, user].add(named(names, f"m{model}", status, at=hour * HOUR_S, user=user))
        assert len(names._used) <= MAX_HOURS
    assert all(len(row - {OTHER}) <= MAX_OF_USER for row in rows.values())
