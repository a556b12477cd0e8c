"""A week as seven lines of characters, the denser the more."""

from __future__ import annotations

from collections.abc import Sequence

DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
SHADES = " .:-=+*#%@"
_HOURS = "     0  3  6  9  12 15 18 21"


def heatmap(week: Sequence[float], most: float | None = None) -> str:
    """168 values by hour of week, from Monday 00:00; one character an hour. ``most``: the value of the densest,
    by default the largest. What is not nothing can be seen."""
    top = most if most is not None else max(week, default=0.0)
    lines = [_HOURS]
    for number, day in enumerate(DAYS):
        cells = "".join(shade(value, top) for value in week[number * 24 : number * 24 + 24])
        lines.append(f"{day}  {cells}".rstrip())
    return "\n".join(lines)


def shade(value: float, top: float) -> str:
    """One character."""
    if value <= 0 or top <= 0:
        return SHADES[0]
    return SHADES[max(1, round(min(1.0, value / top) * (len(SHADES) - 1)))]


def named(hour_of_week: int) -> str:
    """For example ``Mon 09:00``."""
    return f"{DAYS[hour_of_week // 24]} {hour_of_week % 24:02}:00"
