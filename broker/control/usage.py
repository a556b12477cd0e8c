"""The route about usage: what models were used for, by whom."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

from aiohttp import web
from pydantic import Field

from broker.control.requests import answer, query
from broker.control.routes import control
from broker.control.schema import Answer, Body, UserId, when
from broker.session.usage import HOUR_S
from broker.store.usage import MAX_ROWS, By, UsageFilter, UsageSum

Name = Annotated[str, Field(max_length=128)]
NAMES = ("user", "team", "provider", "model")


class Wanted(Body):
    user: UserId | None = None
    team: Name | None = Field(None, description="Empty: of users without one.")
    model: Name | None = None
    provider: Name | None = None
    since: datetime | None = Field(None, alias="from", description="Counted from the begin of its hour; UTC.")
    until: datetime | None = Field(None, alias="to", description="Counted to the begin of its hour; UTC.")
    by: By = Field("user", description="Times come in their order; else what costs most, then what takes most tokens.")


class Sum(Answer):
    calls: int = Field(description="To models; looks at lists of them and counts of tokens are none.")
    errors: int = Field(description="Answered with one, or broken off.")
    cached: int = Field(description="For which no provider was asked; they use no tokens.")
    estimated: int = Field(description="Whose tokens no provider has said; they are about as many.")
    input: int = Field(description="Tokens of prompts, those of the provider's cache included.")
    output: int = Field(description="Tokens that models made, those of reasoning included.")
    cache_read: int = Field(description="Of input: read from the provider's cache.")
    cache_write: int = Field(description="Of input: written to it.")
    reasoning: int = Field(description="Of output, where the provider says.")
    cost_usd: float = Field(description="By [gateway.prices] of the time of each call.")
    mean_s: float | None = Field(description="How long a call took.")
    mean_ttft_s: float | None = Field(description="How long until an answer began.")


class Row(Sum):
    key: str | datetime = Field(description="A name, which may be empty, or when the hour or day begins.")


class Usage(Answer):
    by: By
    rows: list[Row] = Field(description=f"At most {MAX_ROWS}.")
    total: Sum = Field(description="Of these rows.")


async def show(request: web.Request) -> web.Response:
    """Added up by what is wanted."""
    wanted = query(request, Wanted)
    equal: Any = {name: getattr(wanted, name) for name in NAMES if getattr(wanted, name) is not None}
    span = {name: _hour(at) for name, at in (("since", wanted.since), ("until", wanted.until)) if at is not None}
    found = await control(request).usage.sums(UsageFilter(equal=equal, **span), wanted.by)
    timed = wanted.by in ("hour", "day")
    rows = [Row(key=when(int(one.key)) if timed else str(one.key), **_figures([one])) for one in found]
    return answer(Usage(by=wanted.by, rows=rows, total=Sum(**_figures(found))))


def _hour(at: datetime) -> int:
    return int((at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()) // HOUR_S


def _figures(found: Sequence[UsageSum]) -> dict[str, Any]:
    """Added up, with means."""

    def total(name: str) -> Any:
        return sum(getattr(one, name) for one in found)

    figures = {name: total(name) for name in Sum.model_fields if not name.startswith("mean_")}
    calls, timed = figures["calls"], total("ttft_calls")
    figures["mean_s"] = total("duration_s") / calls if calls else None
    figures["mean_ttft_s"] = total("ttft_s") / timed if timed else None
    return figures
