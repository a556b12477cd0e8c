"""A week in characters."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from broker.cli.heatmap import SHADES, heatmap, named, shade


def test_a_week_is_drawn_by_day_and_hour() -> None:
    week = [0.0] * 168
    week[9], week[33], week[167] = 4.0, 2.0, 0.01
    lines = heatmap(week).splitlines()
    assert len(lines) == 8
    assert lines[1] == "Mon" + " " * 11 + "@"
    assert lines[2][5 + 9 :] == SHADES[4]
    assert lines[7] == "Sun" + " " * 25 + "."
    assert [line[:3] for line in lines[3:7]] == ["Wed", "Thu", "Fri", "Sat"]
    for hour in range(0, 24, 3):
        assert lines[0][5 + hour :].startswith(str(hour)), "hours stand above their column"


def test_nothing_is_drawn_as_nothing() -> None:
    assert set(heatmap([0.0] * 168).splitlines()[1:]) == {"Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"}
    assert heatmap([0.5] * 168, 1.0).count("@") == 0


@example(0.0, 1.0, 2.2250738585072014e-308)
@given(st.floats(0, 10), st.floats(0, 10), st.floats(0, 10))
def test_more_is_never_lighter(one: float, two: float, top: float) -> None:
    low, high = sorted((one, two))
    assert SHADES.index(shade(low, top)) <= SHADES.index(shade(high, top))


def test_hours_have_names() -> None:
    assert (named(0), named(33), named(167)) == ("Mon 00:00", "Tue 09:00", "Sun 23:00")
