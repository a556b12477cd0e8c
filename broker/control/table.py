"""The control API's routes, all of them."""

from __future__ import annotations

from broker.control import health, hooks, openapi, prompt, schema, sessions, users
from broker.control.routes import Route
from broker.errors import Code

SESSION = "/v1/sessions/{user}/{workspace}"
SECTION = "/v1/users/{user}/config/{section}"
_BRINGUP = (Code.BRINGUP_TIMEOUT, Code.ENGINE_DOWN, Code.IMAGE_MISSING, Code.AGENT_MISSING, Code.AGENT_FAILED)

ROUTES: tuple[Route, ...] = (
    Route(
        "POST",
        "/v1/sessions",
        sessions.create,
        "Create or return a session, and start bringing it up",
        body=schema.CreateSession,
        answer=schema.Attachable,
        errors=(Code.UNKNOWN_AGENT, Code.SESSION_CONFLICT, *_BRINGUP),
        also=(201,),
    ),
    Route("GET", "/v1/sessions", sessions.page, "List sessions", query=schema.Page, answer=schema.Sessions),
    Route("GET", SESSION, sessions.show, "Show a session", answer=schema.Session, errors=(Code.NO_SESSION,)),
    Route(
        "DELETE",
        SESSION,
        sessions.delete,
        "Stop a session and erase its home, journal and tokens",
        answer=schema.Deleted,
        errors=(Code.NO_SESSION,),
    ),
    Route(
        "POST",
        f"{SESSION}/stop",
        sessions.stop,
        "Stop a session's sandbox; its home and journal stay",
        answer=schema.Session,
        errors=(Code.NO_SESSION,),
    ),
    Route(
        "POST",
        f"{SESSION}/tokens",
        sessions.mint,
        "Mint an attach token or a ticket",
        body=schema.MintToken,
        answer=schema.Token,
        status=201,
        errors=(Code.NO_SESSION,),
    ),
    Route(
        "DELETE",
        f"{SESSION}/tokens",
        sessions.revoke,
        "Revoke all attach tokens and close who came in with one",
        answer=schema.Revoked,
    ),
    Route(
        "POST",
        f"{SESSION}/prompt",
        prompt.prompt,
        "Run one turn; ACP updates as server-sent events, then the result",
        body=schema.Prompt,
        media="text/event-stream",
        errors=(Code.NO_SESSION, Code.WRONG_PROTOCOL, Code.SESSION_BUSY, *_BRINGUP),
    ),
    Route(
        "POST",
        f"{SESSION}/prewarm",
        sessions.prewarm,
        "Say that this user will come; nothing is promised",
        answer=schema.Accepted,
        status=202,
        errors=(Code.UNKNOWN_AGENT,),
    ),
    Route(
        "GET",
        f"{SESSION}/timeline",
        sessions.timeline,
        "The last bring-ups, stage by stage",
        answer=schema.Timeline,
        errors=(Code.NO_SESSION,),
    ),
    Route("GET", SECTION, users.get_section, "Read a section of a user's configuration", answer=schema.SectionAnswer),
    Route(
        "PUT",
        SECTION,
        users.put_section,
        "Replace a section; answers when running sandboxes have it",
        body=users.Section,
        answer=schema.SectionStored,
        errors=(Code.BAD_SECTION, Code.DISK_FULL),
    ),
    Route("DELETE", "/v1/users/{user}", users.erase, "Erase everything of a user", answer=schema.Erased),
    Route(
        "POST",
        "/v1/hooks/session",
        hooks.session,
        "The web app's hook: create, pre-warm or stop a session",
        body=schema.HookBody,
        answer=schema.Attachable,
        auth="hook",
        also=(201,),
        accepted=schema.Accepted,
        errors=(
            *(Code.HOOK_SIGNATURE, Code.HOOK_EXPIRED, Code.HOOK_CONFLICT),
            *(Code.UNKNOWN_AGENT, Code.SESSION_CONFLICT, Code.NO_SESSION),
        ),
    ),
    Route("GET", "/livez", health.livez, "Whether the broker runs", answer=schema.Health, auth="none"),
    Route(
        "GET",
        "/readyz",
        health.readyz,
        "Whether new work can be done",
        query=schema.Ready,
        answer=schema.Health,
        auth="none",
        also=(503,),
    ),
    Route("GET", "/metrics", health.metrics, "Prometheus metrics", media="text/plain", auth="none"),
    Route(
        "GET",
        "/v1/openapi.json",
        openapi.serve,
        "This document",
        auth="none",
    ),
)
