"""Bodies and answers of the control API. Times are RFC 3339 in UTC unless a name ends in ``_at_s``."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from broker.config import NAME, USER_ID

UserId = Annotated[str, Field(pattern=f"^{USER_ID.pattern}$", examples=["alice"])]
Workspace = Annotated[str, Field(pattern=f"^{USER_ID.pattern}$", examples=["main"])]
AgentName = Annotated[str, Field(pattern=f"^{NAME.pattern}$", examples=["claude"])]


class Body(BaseModel):
    """Base of request bodies: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Answer(BaseModel):
    """Base of answers: more keys may come."""

    model_config = ConfigDict(extra="allow", frozen=True)


class CreateSession(Body):
    user: UserId
    workspace: Workspace = "main"
    agent: AgentName | None = Field(None, description="Default: session.default_agent, or what the session has.")
    wait: Literal["ready"] | None = Field(None, description="Answer only when the agent is ready.")


class HookBody(Body):
    """What a web app's hook may ask for."""

    user: UserId
    workspace: Workspace = "main"
    agent: AgentName | None = None
    action: Literal["create", "prewarm", "stop"] = "create"


class MintToken(Body):
    ttl_s: float | None = Field(None, gt=0, le=86_400, description="Default: session.token_ttl_s.")
    kind: Literal["token", "ticket"] = Field(
        "token", description="ticket: for ?ticket=, works once, 30 s, for clients that cannot set headers."
    )


class Prompt(Body):
    """One turn: either ``text`` or ``content``."""

    text: str | None = Field(None, min_length=1)
    content: list[dict[str, JsonValue]] | None = Field(None, min_length=1, description="ACP content blocks.")
    acp_session: str | None = Field(None, min_length=1, max_length=256, description="Goes on with this conversation.")

    @model_validator(mode="after")
    def _one(self) -> Prompt:
        if (self.text is None) == (self.content is None):
            raise ValueError("give either text or content")
        return self

    def blocks(self) -> list[dict[str, Any]]:
        """ACP content blocks."""
        return [{"type": "text", "text": self.text}] if self.content is None else list(self.content)


class Page(Body):
    after: str = Field("", max_length=512, description="Cursor: next of the page before.")
    limit: int = Field(100, ge=1, le=1000)


class Ready(Body):
    verbose: str | None = Field(None, description="Present: says what was looked at.")


class Session(Answer):
    """Facts about a session."""

    session: str
    user: str
    workspace: str
    agent: str
    state: Literal["stopped", "starting", "ready", "paused", "stopping", "failed"]


class Attachable(Session):
    """A session and how to attach to it."""

    acp_url: str
    token: str
    expires_at: datetime


class Sessions(Answer):
    sessions: list[Session]
    next: str = Field(description="Cursor of the next page; empty at the end.")


class Token(Answer):
    token: str
    kind: Literal["token", "ticket"]
    user: str
    workspace: str
    acp_url: str
    expires_at: datetime


class Revoked(Answer):
    revoked: int = Field(description="Tokens and tickets that were good until now.")
    closed: int = Field(description="Clients that were connected.")


class Stage(Answer):
    stage: str
    start_ms: float
    ms: float


class Bringup(Answer):
    path: str
    driver: str
    started_at: Any
    total_ms: float | None = None
    stages: list[Stage]


class Timeline(Answer):
    bringups: list[Bringup] = Field(description="Newest first.")


class AppliedTo(Answer):
    workspace: str
    state: Literal["applied", "stored", "failed"]
    effect: dict[str, str] = Field(description="By part: now, next_turn, next_session or next_start.")
    error: dict[str, Any] | None = None


class SectionAnswer(Answer):
    user: str
    section: str
    value: dict[str, Any]
    version: int = Field(description="Counts writes; 0 where nothing is stored.")


class SectionStored(SectionAnswer):
    effect: Literal["now", "next_turn", "next_session", "next_start"] = Field(
        description="When it has taken effect everywhere."
    )
    applied: list[AppliedTo] = Field(description="Sessions in memory.")


class PutCredential(Body):
    """A credential on its way in."""

    kind: Literal["api_key", "oauth", "file"] = "api_key"
    mode: Literal["gateway", "file"] | None = Field(
        None, description="How it reaches the agent; follows from the kind."
    )
    value: str | dict[str, JsonValue] = Field(
        repr=False, description="The key; or a token set; or the CLI's own credential file, as text or object."
    )


class Credential(Answer):
    """What may be told of a credential; never its value."""

    user: str
    provider: str
    kind: Literal["api_key", "oauth", "file"]
    mode: Literal["gateway", "file"]
    fingerprint: str = Field(description="Equal for equal values of one user and provider; made with a key.")
    created_at: datetime
    updated_at: datetime
    expires_at: datetime | None = None
    problem: str = Field("", description="Why it could not be renewed.")


class CredentialStored(Credential):
    effect: Literal["now", "next_turn", "next_session", "next_start"] = Field(
        description="When it has taken effect everywhere."
    )
    applied: list[AppliedTo] = Field(description="Sessions in memory.")


class Credentials(Answer):
    credentials: list[Credential] = Field(description="By provider.")


class CredentialDeleted(Answer):
    user: str
    provider: str
    deleted: Literal[True] = True
    effect: Literal["now", "next_turn", "next_session", "next_start"] = Field(
        description="When it has taken effect everywhere."
    )
    applied: list[AppliedTo] = Field(description="Sessions in memory.")


class VaultKey(Answer):
    id: str
    sealed: int = Field(description="Credentials that are sealed with it.")


class VaultKeys(Answer):
    key_file: str
    keys: list[VaultKey] = Field(description="The one that seals first.")


class Rotated(Answer):
    key: str = Field(description="The key that seals now.")
    sealed: int = Field(description="Credentials that were sealed anew.")
    refused: int = Field(description="Credentials that did not open; their keys are kept.")
    dropped: list[str]
    kept: list[str]


class Erased(Answer):
    user: str
    sessions: int


class Deleted(Answer):
    user: str
    workspace: str
    deleted: Literal[True] = True


class Accepted(Answer):
    user: str
    workspace: str
    accepted: Literal[True] = True


class Health(Answer):
    status: Literal["ok", "unavailable"]
    checks: dict[str, str] = Field({}, description="What was looked at; ok, or what is wrong.")


class Problem(Answer):
    """RFC 9457 problem details."""

    type: str = "about:blank"
    title: str
    status: int
    code: str = Field(description="Stable; see the list of error codes.")
    hint: str = Field(description="What to do about it.")
    retryable: bool
    detail: str | None = None
    details: dict[str, Any] | None = None


def when(seconds: float) -> datetime:
    """Unix seconds as a time in UTC."""
    return datetime.fromtimestamp(seconds, UTC).replace(microsecond=0)
