"""Routes about users' credentials, which go in and never come out, and about the keys they are sealed with."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from aiohttp import web

from broker.control import schema
from broker.control.requests import answer, body, user_of
from broker.control.routes import Control, control
from broker.control.users import applied_to, latest
from broker.errors import Code, CortexError
from broker.problems import nearest
from broker.session.credentials import secret_of, speakable
from broker.session.port import Applied
from broker.store.keeper import Keeper
from broker.store.vault import Facts


async def page(request: web.Request) -> web.Response:
    """What there is of a user's credentials."""
    user = user_of(request)
    found = await _keeper(request).vault.list(user)
    return answer(schema.Credentials(credentials=[schema.Credential(**_told(facts)) for facts in found]))


async def show(request: web.Request) -> web.Response:
    """One of them."""
    user, provider = user_of(request), request.match_info["provider"]
    facts = await _keeper(request).vault.facts(user, provider)
    if facts is None:
        raise _none(user, provider)
    return answer(schema.Credential(**_told(facts)))


async def put(request: web.Request) -> web.Response:
    """Stores a credential; answers when the user's running sandboxes have the use of it."""
    context, user, provider = control(request), user_of(request), request.match_info["provider"]
    providers = context.config().gateway.providers
    if provider not in providers:
        raise CortexError(
            Code.UNKNOWN_PROVIDER,
            f"there is no provider {provider[:64]!r}",
            hint=nearest(provider[:64], providers) or "add it to [gateway.providers]",
        )
    sent = await _sent(request)
    secret = secret_of(sent.kind, sent.mode, sent.value, provider, providers[provider], time.time())
    facts = await _keeper(request).vault.put(user, provider, secret)
    assert facts is not None, "no version was asked for"
    return answer(schema.CredentialStored(**_told(facts), **await _spread(context, user)))


async def _sent(request: web.Request) -> schema.PutCredential:
    """The body. Raises ``BAD_REQUEST`` that tells no name that may be a secret in the wrong place."""
    try:
        return await body(request, schema.PutCredential)
    except CortexError as error:
        names = [name for problem in error.details.get("problems", ()) for name in problem["path"].split(".") if name]
        if all(map(speakable, names)):
            raise
        raise CortexError(
            Code.BAD_REQUEST,
            "the request is not valid",
            hint='send {"value": …}, with "kind" where it is no API key; see /v1/openapi.json',
        ) from None


async def delete(request: web.Request) -> web.Response:
    """Erases a credential; answers when the user's running sandboxes have lost the use of it."""
    context, user, provider = control(request), user_of(request), request.match_info["provider"]
    if not await _keeper(request).vault.delete(user, provider):
        raise _none(user, provider)
    return answer(schema.CredentialDeleted(user=user, provider=provider, **await _spread(context, user)))


async def keys(request: web.Request) -> web.Response:
    """The vault's keys, by id."""
    keeper = _keeper(request)
    found = [schema.VaultKey(id=name, sealed=sealed) for name, sealed in await keeper.view()]
    return answer(schema.VaultKeys(key_file=str(keeper.path), keys=found))


async def rotate(request: web.Request) -> web.Response:
    """Makes a new key and seals everything with it; answers when that is done, and goes on when nobody waits."""
    done = await _keeper(request).rotate()
    return answer(
        schema.Rotated(
            key=done.key, sealed=done.sealed, refused=done.refused, dropped=list(done.dropped), kept=list(done.kept)
        )
    )


def _keeper(request: web.Request) -> Keeper:
    """The vault's. Raises ``ISOLATION_MISSING``."""
    keeper = control(request).keeper
    if keeper is None:
        raise CortexError(
            Code.ISOLATION_MISSING,
            "there is no vault where sandboxes are not isolated: their agents could read its keys",
            hint="install bubblewrap, or set sandbox.driver to docker; cortex doctor says more",
        )
    return keeper


def _told(facts: Facts) -> dict[str, Any]:
    return {
        "user": facts.user,
        "provider": facts.provider,
        "kind": facts.kind,
        "mode": facts.mode,
        "fingerprint": facts.fingerprint,
        "created_at": schema.when(facts.created_at),
        "updated_at": schema.when(facts.updated_at),
        "expires_at": schema.when(facts.expires_at) if facts.expires_at else None,
        "problem": facts.problem,
    }


async def _spread(context: Control, user: str) -> dict[str, Any]:
    """What it did to the user's sessions."""
    applied: Sequence[Applied] = await context.registry.config_changed(user, "credentials")
    return {"effect": latest(applied), "applied": applied_to(applied)}


def _none(user: str, provider: str) -> CortexError:
    return CortexError(
        Code.NO_CREDENTIAL,
        f"{user} has no credential for {provider[:64]!r}",
        hint="see what there is: cortex user credential list",
    )
