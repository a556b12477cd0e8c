"""What a route is: the table that makes both the application and its OpenAPI document."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from aiohttp import web
from pydantic import BaseModel

from broker.access import Access
from broker.config import Config
from broker.errors import Code
from broker.host.tasks import TaskOwner
from broker.session.egress_view import EgressView
from broker.session.foresight import Foresight
from broker.session.port import RegistryPort
from broker.session.usage import Accounting
from broker.store.keeper import Keeper
from broker.store.users import UserStore

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class Control:
    """What the handlers work with.

    ``config``: the tree of the moment. ``front_url``: ``ws://host:port`` of the front door, without a
    path. ``health``: what readiness depends on, by name; an empty string is good, else what is wrong.
    ``keeper``: of the vault; None where there is none, because sandboxes are not isolated.
    ``foresight``: who comes when. ``pool``: what operators see of the warm sandboxes. ``usage``: what models were
    used for. ``egress``: what users' sandboxes wanted of hosts outside.
    """

    registry: RegistryPort
    access: Access
    users: UserStore
    config: Callable[[], Config]
    front_url: Callable[[], str]
    health: Callable[[], Awaitable[Mapping[str, str]]]
    keeper: Keeper | None
    foresight: Foresight
    pool: Callable[[], Mapping[str, Any]]
    usage: Accounting
    egress: EgressView = field(default_factory=EgressView)
    tasks: TaskOwner = field(default_factory=lambda: TaskOwner("control"))


CONTROL: web.AppKey[Control] = web.AppKey("control", Control)


@dataclass(frozen=True, eq=False)
class Route:
    """One method and path. ``auth``: who may call it; ``errors``: codes of its own."""

    method: Literal["GET", "POST", "PUT", "DELETE"]
    path: str
    handler: Handler
    summary: str
    answer: type[BaseModel] | None = None
    status: int = 200
    body: type[BaseModel] | None = None
    query: type[BaseModel] | None = None
    auth: Literal["admin", "hook", "none"] = "admin"
    media: str = "application/json"
    errors: tuple[Code, ...] = ()
    also: tuple[int, ...] = ()
    """More statuses with the same answer."""
    accepted: type[BaseModel] | None = None
    """The answer of status 202 where it is another one."""


ROUTE_TABLE: web.AppKey[tuple[Route, ...]] = web.AppKey("routes", tuple)


def control(request: web.Request) -> Control:
    """The context of the application that serves ``request``."""
    return request.app[CONTROL]
