"""The route about what a user's sandboxes wanted of the world outside."""

from __future__ import annotations

from datetime import datetime

from aiohttp import web
from pydantic import Field

from broker.control.requests import answer, user_of
from broker.control.routes import control
from broker.control.schema import Answer, when
from broker.session.egress_view import Result, allow_line


class EgressHost(Answer):
    """Since the broker started. Bytes as the sandbox sees them."""

    workspace: str
    host: str
    port: int
    tool: str = Field(description="Which tool asked last, as it says itself; empty where it does not.")
    last: Result = Field(description="What was decided last.")
    allowed: int
    denied: int = Field(description="No list has the host.")
    refused_address: int = Field(description="The name leads to an address that sandboxes may not reach.")
    limited: int = Field(description="The sandbox had used what it may.")
    sent: int
    received: int
    last_at: datetime
    allow: str = Field(description="The command that allows the host; empty unless it was denied last.")


class Egress(Answer):
    user: str
    hosts: list[EgressHost] = Field(description="The last used first; so many are kept of a user.")


async def of_user(request: web.Request) -> web.Response:
    """One user's hosts."""
    context, user = control(request), user_of(request)
    stored = await context.users.section(user, "egress")
    section = {**context.config().defaults.egress, **(stored.value if stored else {})}
    rows = []
    for seen in context.egress.of_user(user):
        allow = allow_line(user, section, seen.host, seen.port) if seen.last == "denied" else ""
        rows.append(EgressHost.model_validate({**seen.view(), "last_at": when(seen.last_at), "allow": allow}))
    return answer(Egress(user=user, hosts=rows))
