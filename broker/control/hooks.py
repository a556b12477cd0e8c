"""The web app's hook: create, pre-warm or stop a session, by a Standard Webhooks signature."""

from __future__ import annotations

from aiohttp import web

from broker.control import schema
from broker.control.requests import answer, parse, raw_body
from broker.control.routes import control
from broker.control.sessions import attachable


async def session(request: web.Request) -> web.Response:
    """Does what a signed hook asks; the signature is checked before the body is looked at.

    A replay (same ``webhook-id``, same body) changes nothing and is told the same token. The receipt
    is written after the effect, so that what a crash cut short is done by the retry.
    """
    context = control(request)
    raw = await raw_body(request)
    call = context.access.verify_hook(request.headers, raw)
    wanted = parse(raw, schema.HookBody)
    replay = await context.access.hook_seen(call)
    if wanted.action == "stop":
        if not replay:
            await _stop(request, wanted)
        await context.access.admit_hook(call, wanted.user, wanted.workspace)
        return answer(schema.Accepted(user=wanted.user, workspace=wanted.workspace), 202)
    if wanted.action == "prewarm":
        if not replay:
            await context.registry.prewarm(wanted.user, wanted.workspace, wanted.agent, create=True, announced=True)
        await context.access.admit_hook(call, wanted.user, wanted.workspace)
        return answer(schema.Accepted(user=wanted.user, workspace=wanted.workspace), 202)
    created = False
    if replay:
        found = await context.registry.load(wanted.user, wanted.workspace)
    else:
        found, created = await context.registry.create(wanted.user, wanted.workspace, wanted.agent)
    minted = await context.access.mint_for_hook(call, found.user, found.workspace)
    return answer(attachable(context, found, minted), 201 if created else 200)


async def _stop(request: web.Request, wanted: schema.HookBody) -> None:
    registry = control(request).registry
    found = registry.held(wanted.user, wanted.workspace) or await registry.load(wanted.user, wanted.workspace)
    await found.stop()
