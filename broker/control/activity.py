"""Routes about who comes when: patterns, what is forecast, and what logs say of the past."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from aiohttp import web
from pydantic import Field

from broker.control.requests import answer, body, query, user_of
from broker.control.routes import control
from broker.control.schema import Answer, Body, UserId, when
from broker.session.activity import WEEK_HOURS, Kind
from broker.session.foresight import Foresight
from broker.store.activity import Tally

MOST = 5000
Second = Annotated[int, Field(ge=0, le=59)]
Week = Annotated[
    list[float],
    Field(min_length=WEEK_HOURS, max_length=WEEK_HOURS, description="By hour of week; 0 is Monday 00:00 UTC."),
]


class Top(Body):
    limit: int = Field(20, ge=1, le=1000, description="Users that are listed.")


class Peak(Answer):
    hour_of_week: int
    value: float


class LeadTimes(Answer):
    """From a word of intent to the first use after it."""

    intents: int
    followed: int = Field(description="After which the user came within the hour.")
    median_s: float | None
    p90_s: float | None


class ActiveUser(Answer):
    user: str
    minutes: int = Field(description="In which the user was there.")
    uses: int
    last_hour_at: datetime = Field(description="The hour of the last use.")


class Overview(Answer):
    history_days: int
    days_known: float
    uses: int
    week: Week = Field(description="Mean number of users by hour of week; 0 is Monday 00:00 UTC.")
    peaks: list[Peak] = Field(description="The busiest hours, the busiest first.")
    leads: LeadTimes = Field(description="Of the users that are looked at.")
    users: list[ActiveUser] = Field(description="The most active first.")


class Window(Answer):
    """Minutes after a use."""

    start: float
    end: float
    source: Literal["histogram", "recent"]


class Expected(Answer):
    user: str
    start: datetime
    end: datetime
    probability: float = Field(description="That it is within twice the lead.")
    source: Literal["hour_of_week", "histogram", "recent"]


class UserActivity(Answer):
    user: str
    minutes: int = Field(description="In which the user was there.")
    first_at: datetime | None
    last_at: datetime | None
    week: Week = Field(description="Probability that the user is there, by hour of week; 0 is Monday 00:00 UTC.")
    peaks: list[Peak]
    leads: LeadTimes
    times_away: float = Field(description="Between two uses; older days count less.")
    times_out_of_range: float = Field(description="Of these longer than 4 h.")
    window: Window | None = Field(description="When the user comes back; null: there is no pattern.")
    keep_s: float | None = Field(description="For which a sandbox is worth keeping; null: there is no pattern.")
    expected: Expected | None = Field(description="Whether a sandbox should be ready now.")


class Foreseen(Expected):
    action: Literal["would prewarm", "prewarmed", "no session", "failed", "left out"]


class Outcome(Answer):
    user: str
    result: Literal["hit", "miss", "wasted"]
    at: datetime
    ready_s: float = Field(description="Time that a sandbox waited, or would have.")
    source: str


class Prepared(Answer):
    user: str
    at: datetime
    found: dict[str, str] = Field(description="By home, packages, credentials: empty, or what is wrong.")


class Counts(Answer):
    hit: float
    miss: float
    wasted: float


class Forecast(Answer):
    mode: Literal["off", "forecast", "on"]
    lead_s: float
    looked_at: datetime | None
    users: int = Field(description="That are looked at.")
    days_known: float
    quiet: bool = Field(description="Whether it is a quiet time, at which active users are looked after.")
    expected: list[Foreseen] = Field(description="At the last look; the likeliest first.")
    counts: Counts = Field(description="Since the start: came while expected, came though not, did not come.")
    ready_s: Counts = Field(description="Seconds that sandboxes waited, or would have.")
    recent: list[Outcome] = Field(description="The last first.")
    prepared: list[Prepared] = Field(description="The last first.")


class Import(Body):
    """What a log says, added up by minute. Importing it again changes nothing."""

    tallies: list[tuple[UserId, Annotated[int, Field(ge=0)], Kind, Annotated[int, Field(ge=1)], Second, Second]] = (
        Field(
            max_length=MOST,
            description="User, minute since the epoch, kind, count, and seconds of the first and last within it.",
        )
    )


class Imported(Answer):
    new: int = Field(description="Minutes that were not known, or not fully.")
    known: int
    too_old: int = Field(description="Older than pool.forecast.history_days; left out.")
    in_future: int = Field(description="Left out.")


async def overview(request: web.Request) -> web.Response:
    """Everybody."""
    found = await _foresight(request).overview(query(request, Top).limit)
    users = [{**one, "last_hour_at": when(one["last_hour_at"])} for one in found.pop("users")]
    return answer(Overview.model_validate({**found, "users": users}))


async def of_user(request: web.Request) -> web.Response:
    """One user."""
    found = await _foresight(request).of_user(user_of(request))
    return answer(UserActivity.model_validate({**found, "expected": found["expected"] and _timed(found["expected"])}))


async def forecast(request: web.Request) -> web.Response:
    """Who is expected, and how often that was right."""
    found = _foresight(request).forecast()
    listed = {name: [_timed(one) for one in found[name]] for name in ("expected", "recent", "prepared")}
    return answer(Forecast.model_validate({**found, **listed}))


async def take_over(request: web.Request) -> web.Response:
    """Takes over what a log says."""
    wanted = await body(request, Import)
    tallies = [
        Tally(minute, min(first, last), kind, user, count, max(first, last))
        for user, minute, kind, count, first, last in wanted.tallies
    ]
    new, old, future = await _foresight(request).merge(tallies)
    known = len(tallies) - new - old - future
    return answer(Imported(new=new, known=known, too_old=old, in_future=future))


def _timed(one: dict[str, Any]) -> dict[str, Any]:
    return {name: when(value) if name in ("start", "end", "at") else value for name, value in one.items()}


def _foresight(request: web.Request) -> Foresight:
    return control(request).foresight
