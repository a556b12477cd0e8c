"""Routes about a user's configuration sections, and erasing a user."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Literal, get_args

from aiohttp import web
from pydantic import JsonValue, RootModel

from broker.control import schema
from broker.control.requests import answer, body, user_of
from broker.control.routes import control
from broker.session.port import Applied
from broker.session.sections import check_name, validate

Effect = Literal["now", "next_turn", "next_session", "next_start"]
EFFECTS: tuple[Effect, ...] = get_args(Effect)
"""The soonest first."""


class Section(RootModel[dict[str, JsonValue]]):
    """A section is an object; which keys it may have depends on the section."""


def latest(applied: Sequence[Applied]) -> Effect:
    """When a change has taken effect everywhere; ``next_start`` where nothing runs or it failed."""
    if not applied or any(one.state != "applied" for one in applied):
        return "next_start"
    found = {effect for one in applied for effect in one.effect.values()}
    return next((effect for effect in reversed(EFFECTS) if effect in found), "now")


def applied_to(applied: Sequence[Applied]) -> list[schema.AppliedTo]:
    """As it is answered."""
    return [schema.AppliedTo(**{key: item for key, item in asdict(one).items() if key != "user"}) for one in applied]


async def get_section(request: web.Request) -> web.Response:
    """A section as it is stored."""
    user, section = user_of(request), request.match_info["section"]
    check_name(section)
    stored = await control(request).users.section(user, section)
    value, version = (stored.value, stored.version) if stored else ({}, 0)
    return answer(schema.SectionAnswer(user=user, section=section, value=value, version=version))


async def put_section(request: web.Request) -> web.Response:
    """Replaces a section; answers when the user's running sandboxes have it."""
    context, user, section = control(request), user_of(request), request.match_info["section"]
    check_name(section)
    value = validate(section, (await body(request, Section)).root)
    version = await context.users.put_section(user, section, value)
    applied = await context.registry.config_changed(user, section)
    told = schema.SectionStored(
        user=user,
        section=section,
        value=value,
        version=version,
        effect=latest(applied),
        applied=applied_to(applied),
    )
    return answer(told)


async def erase(request: web.Request) -> web.Response:
    """Erases everything of a user. Sessions first: what fails there leaves the rest to try again."""
    context, user = control(request), user_of(request)
    sessions = await context.registry.erase_user(user)
    if context.keeper is not None:
        await context.keeper.vault.erase(user)
    context.foresight.forget(user)
    context.egress.forget(user)
    context.usage.forget(user)
    await context.users.delete(user)
    return answer(schema.Erased(user=user, sessions=sessions))
