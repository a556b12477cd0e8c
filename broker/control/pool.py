"""The route about warm sandboxes: how many there are, why there are not more, and what they are worth."""

from __future__ import annotations

from typing import Literal

from aiohttp import web
from pydantic import Field

from broker.control.requests import answer
from broker.control.routes import control
from broker.control.schema import Answer


class OfUsers(Answer):
    """Sessions that are up though nobody uses them."""

    hot: int
    paused: int


class Claims(Answer):
    """Since the broker started."""

    hit: int
    empty: int = Field(description="There was none.")
    stale: int = Field(description="Those that there were had been made otherwise than the user needs.")


class PoolAgent(Answer):
    """The warm sandboxes of one agent."""

    agent: str
    minimum: int
    target: int = Field(description="Generic ones that are wanted now.")
    maximum: int
    keep_hot: int = Field(description="So many of them are not to be paused.")
    making: int
    hot: int
    paused: int
    ending: int
    stuck: int = Field(description="Of those that are ending: could not be put away yet.")
    short: Literal["", "making", "ending", "busy", "rate", "memory", "breaker", "maximum"] = Field(
        description="Why there are fewer than wanted; empty when there are enough."
    )
    users: OfUsers
    claims: Claims
    hit_rate: float | None = Field(description="Of the claims since the broker started.")
    recent_hit_rate: float | None = Field(description="Of the last hundred.")
    breaker: Literal["closed", "open", "half_open"]
    failures: int = Field(description="In a row.")
    error: str = Field(description="Why the last one could not be made.")
    retry_in_s: float
    bytes_each: int
    measured: bool = Field(description="Whether bytes_each was measured, or is a guess.")
    memory_bytes: int = Field(description="What all of them take, users' own included.")
    idle_hours: float = Field(description="That generic ones were warm, all together.")


class PoolMemory(Answer):
    warm_bytes: int
    budget_bytes: int
    host_available_bytes: int
    reserve_bytes: int


class PoolCost(Answer):
    """In the money of pool.cost_per_hour."""

    per_sandbox_hour: float
    idle_now_per_hour: float
    idle_since_start: float


class Pool(Answer):
    agents: list[PoolAgent]
    claims: dict[str, dict[str, int]] = Field(description="By kind (user, generic, cold) and result.")
    memory: PoolMemory
    cost: PoolCost | None = Field(description="None unless pool.cost_per_hour is set.")
    image: str = Field(description="Id of what sandboxes are made from; empty where there is none.")
    image_error: str
    yielding: bool = Field(description="Users' sandboxes are being started; none is made ahead.")


async def show(request: web.Request) -> web.Response:
    """As it is now."""
    return answer(Pool.model_validate(control(request).pool()))
