"""Routes about sessions and their attach tokens."""

from __future__ import annotations

from aiohttp import web

from broker.access import Minted
from broker.control import schema
from broker.control.requests import answer, body, query, user_of, workspace_of
from broker.control.routes import Control, control
from broker.errors import Code, CortexError
from broker.host.tasks import both
from broker.session.port import SessionPort


def acp_url(context: Control, protocol: str) -> str:
    """Where a client of an agent of ``protocol`` connects: ``…/acp``, or ``…/raw`` for its own WebSocket."""
    public = context.config().control.public_ws_url or f"{context.front_url()}/acp"
    return public if protocol == "acp" else f"{public.removesuffix('/acp').rstrip('/')}/raw"


def attachable(context: Control, session: SessionPort, minted: Minted) -> schema.Attachable:
    """The answer that lets a client attach."""
    return schema.Attachable(
        session=session.id,
        user=session.user,
        workspace=session.workspace,
        agent=session.agent,
        state=session.state,
        acp_url=acp_url(context, session.protocol),
        token=minted.token,
        expires_at=schema.when(minted.expires_at),
    )


async def load(request: web.Request) -> SessionPort:
    """The session in the path. Raises ``NO_SESSION``."""
    user, workspace = user_of(request), workspace_of(request)
    registry = control(request).registry
    return registry.held(user, workspace) or await registry.load(user, workspace)


async def create(request: web.Request) -> web.Response:
    """Creates or returns a session and starts bringing it up."""
    context = control(request)
    wanted = await body(request, schema.CreateSession)

    async def session_of() -> tuple[SessionPort, bool]:
        session, created = await context.registry.create(wanted.user, wanted.workspace, wanted.agent)
        if wanted.wait == "ready":
            await session.wait_ready()
        return session, created

    # The token's row first: a claim's would wait behind it. Without a session it opens nothing, and is told to nobody.
    minted, (session, created) = await both(context.access.mint(wanted.user, wanted.workspace), session_of())
    return answer(attachable(context, session, minted), 201 if created else 200)


async def page(request: web.Request) -> web.Response:
    """A page of stored sessions."""
    wanted = query(request, schema.Page)
    views, following = await control(request).registry.list(after=wanted.after, limit=wanted.limit)
    return answer(schema.Sessions(sessions=[schema.Session(**view) for view in views], next=following))


async def show(request: web.Request) -> web.Response:
    """One session."""
    return answer(schema.Session(**(await load(request)).view()))


async def delete(request: web.Request) -> web.Response:
    """Stops and erases a session; its tokens go too."""
    context, user, workspace = control(request), user_of(request), workspace_of(request)
    await context.access.revoke(user, workspace)
    await context.registry.delete(user, workspace)
    return answer(schema.Deleted(user=user, workspace=workspace))


async def stop(request: web.Request) -> web.Response:
    """Stops a session's sandbox; home and journal stay."""
    session = await load(request)
    await session.stop()
    return answer(schema.Session(**session.view()))


async def prewarm(request: web.Request) -> web.Response:
    """Says that this user will come."""
    context = control(request)
    session = await context.registry.prewarm(user_of(request), workspace_of(request), create=True, announced=True)
    return answer(schema.Accepted(user=session.user, workspace=session.workspace), 202)


async def timeline(request: web.Request) -> web.Response:
    """The last bring-ups."""
    entries = (await load(request)).timeline()
    return answer(schema.Timeline(bringups=[schema.Bringup(**entry) for entry in entries]))


async def mint(request: web.Request) -> web.Response:
    """A token or a single-use ticket."""
    context = control(request)
    wanted = await body(request, schema.MintToken)
    session = await load(request)
    if wanted.kind == "ticket":
        minted = context.access.issue_ticket(session.user, session.workspace)
    else:
        minted = await context.access.mint(session.user, session.workspace, wanted.ttl_s)
    told = schema.Token(
        token=minted.token,
        kind=wanted.kind,
        user=session.user,
        workspace=session.workspace,
        acp_url=acp_url(context, session.protocol),
        expires_at=schema.when(minted.expires_at),
    )
    return answer(told, 201)


async def revoke(request: web.Request) -> web.Response:
    """Revokes all tokens of a session and closes who came in with one."""
    context, user, workspace = control(request), user_of(request), workspace_of(request)
    revoked = await context.access.revoke(user, workspace)
    held = context.registry.held(user, workspace)
    reason = CortexError(Code.TOKEN_REVOKED, "the token was revoked", hint="ask the web app for a new one")
    closed = held.close_clients(reason.code.close_code, reason.close_reason()) if held else 0
    return answer(schema.Revoked(revoked=revoked, closed=closed))
