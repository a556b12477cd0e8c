"""Credentials of users: what may be stored, and how a session's sandbox gets the use of it.

    kind      value                                    mode
    api_key   text                                     gateway: put into each call, the sandbox has a placeholder
    oauth     a token set; renewed before it expires   gateway: likewise, as a bearer token
    file      the CLI's own credential file            file: given to the sandbox; its own headers pass the gateway

A user's own credential stands before the operator's, and nothing takes its place when it cannot be used.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import structlog
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from broker.config import AgentConfig, Config, ProviderConfig
from broker.errors import Code, CortexError
from broker.host.tasks import TaskOwner
from broker.problems import from_validation
from broker.session.oauth import expiry, is_token
from broker.session.providers import Credential, Credentials
from broker.session.refresher import Refresher
from broker.store.vault import Entry, Kind, Mode, Secret, Vault
from sandbox_agent.wire.messages import MAX_CREDENTIAL_FILE

_NAME = re.compile(r"[A-Za-z_]{1,32}")
log = structlog.get_logger(__name__)


class TokenSet(BaseModel):
    """A token set as it is stored through the control API; what is not needed to use it is not kept."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    access_token: str
    refresh_token: str | None = None
    expires_at: float | None = Field(None, gt=0, lt=1e11, description="Seconds since the epoch, not milliseconds.")
    expires_in: float | None = Field(None, gt=0)
    account_id: str | None = Field(None, max_length=256, pattern=r"^[\x21-\x7e]+$")
    token_type: str | None = None
    id_token: str | None = None
    scope: str | None = None
    scopes: list[str] | None = None


def secret_of(
    kind: Kind, mode: Mode | None, value: str | Mapping[str, Any], provider: str, config: ProviderConfig, now: float
) -> Secret:
    """What is sealed of a credential as it was sent. Raises ``BAD_CREDENTIAL``, which never quotes the value."""
    meant: Mode = "file" if kind == "file" else "gateway"
    if mode not in (None, meant):
        raise _bad(f"a credential of kind {kind} has mode {meant}", "leave the mode out")
    if kind == "api_key":
        return Secret(kind, meant, _api_key(value))
    if kind == "file":
        return Secret(kind, meant, _file(value))
    if not config.oauth.token_url:
        raise _bad(
            f"provider {provider} takes no token sets",
            f"set [gateway.providers.{provider}.oauth] token_url and client_id, if the provider's terms allow it",
        )
    return _token_set(value, now)


def _api_key(value: str | Mapping[str, Any]) -> str:
    key = value.strip() if isinstance(value, str) else ""
    if not is_token(key):
        raise _bad("an API key is one line of printable text", "send the key alone")
    return key


def _file(value: str | Mapping[str, Any]) -> str:
    return check_file((value if isinstance(value, str) else json.dumps(value)).encode(errors="replace"))


def check_file(content: bytes) -> str:
    """The text of a credential file. Raises ``BAD_CREDENTIAL``."""
    if len(content) > MAX_CREDENTIAL_FILE:
        raise _bad(f"a credential file has {MAX_CREDENTIAL_FILE} bytes at most", "send the CLI's own file")
    try:
        text = content.decode()
        held = json.loads(text)
    except (ValueError, RecursionError):
        held = None
    if not isinstance(held, dict) or not held:
        raise _bad("a credential file is a JSON object", "send the file that the CLI writes when it signs in")
    return text


def _token_set(value: str | Mapping[str, Any], now: float) -> Secret:
    try:
        found = TokenSet.model_validate_json(value if isinstance(value, str) else json.dumps(value))
    except ValidationError as error:
        wrong = [problem for problem in from_validation(error, TokenSet) if all(map(speakable, problem.path))]
        raise _bad(
            f"the token set is not valid{f': {wrong[0]}' if wrong else ''}",
            f"send a JSON object of {', '.join(TokenSet.model_fields)}",
        ) from None
    if not all(is_token(token) for token in (found.access_token, found.refresh_token) if token is not None):
        raise _bad("a token is one line of printable text", "send the tokens as they were issued")
    if (found.token_type or "bearer").lower() != "bearer":
        raise _bad("only bearer tokens can be used", "leave the token type out")
    kept = found.model_dump(include={"access_token", "refresh_token", "account_id"}, exclude_none=True)
    expires_at = found.expires_at or expiry(found.access_token, found.expires_in, now)
    return Secret("oauth", "gateway", kept, expires_at=expires_at)


def speakable(name: str) -> bool:
    """Whether a key of what was sent may be told; what was sent in a wrong way may have a secret for a key."""
    return _NAME.fullmatch(name) is not None


def _bad(what: str, hint: str) -> CortexError:
    return CortexError(Code.BAD_CREDENTIAL, what, hint=hint)


class VaultCredentials:
    """``Credentials`` of users from the vault, over those of ``operator``.

    ``changed`` has the sessions of a user take what is stored now; ``awake``: whether the user has one that runs.
    """

    def __init__(
        self,
        vault: Vault,
        config: Callable[[], Config],
        operator: Credentials,
        *,
        changed: Callable[[str], Awaitable[object]],
        awake: Callable[[str], bool],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._vault = vault
        self._config = config
        self._operator = operator
        self._changed = changed
        self._tasks = TaskOwner("credentials")
        self._telling: dict[str, bool] = {}
        self.refresher = Refresher(vault, config, changed=changed, awake=awake, clock=clock)

    async def get(self, user: str, name: str, provider: ProviderConfig) -> Credential:
        """See ``Credentials``. Raises ``VAULT_TAMPERED`` too."""
        entry = await self._vault.get(user, name) if user else None
        if entry is None:
            return await self._operator.get(user, name, provider)
        if entry.secret.kind == "api_key":
            return Credential(str(entry.secret.value))
        if entry.secret.kind == "file":
            return Credential(scheme="passthrough")
        if not provider.oauth.token_url:
            return Credential()
        return _bearer(await self.refresher.current(entry), provider)

    async def files(self, user: str, agent_name: str, agent: AgentConfig) -> list[dict[str, Any]]:
        """See ``Credentials``."""
        entry = await self._file_of(user, agent)
        if entry is None:
            return []
        return [{"path": agent.credential_path, "mode": 0o600, "content": str(entry.secret.value).encode()}]

    async def _file_of(self, user: str, agent: AgentConfig) -> Entry | None:
        if not user or not agent.provider or not agent.credential_path:
            return None
        entry = await self._vault.get(user, agent.provider)
        return entry if entry is not None and entry.secret.kind == "file" else None

    async def refreshed(
        self, user: str, agent: AgentConfig, path: str, content: bytes, after: Sequence[str] = ()
    ) -> None:
        """See ``Credentials``. Durable when it returns; then the user's other sandboxes get it. Raises
        ``BAD_CREDENTIAL`` for what can be no credential file, or was not bound."""
        text = check_file(content)
        entry = await self._file_of(user, agent)
        if entry is None or path != agent.credential_path:
            raise _bad("that is no credential file of this sandbox", "the agent's own file, as it was given, is kept")
        held = str(entry.secret.value)
        if after and text != held and hashlib.sha256(held.encode()).hexdigest() not in after:
            log.info("credential_file_outdated", user=user, provider=agent.provider)
        elif text != held:
            # In the place of the version that was looked at: one that was stored meanwhile is newer.
            secret = Secret("file", "file", text)
            stored = await self._vault.put(user, agent.provider, secret, expect=entry.facts.version)
            log.info("credential_file_sealed", user=user, provider=agent.provider, kept=stored is not None)
        self._tell(user)

    def _tell(self, user: str) -> None:
        """Once at a time, however often a sandbox says something; once more for what came meanwhile."""
        if user not in self._telling:
            self._tasks.start(self._take(user), "take")
        self._telling[user] = True

    async def _take(self, user: str) -> None:
        try:
            while self._telling[user]:
                self._telling[user] = False
                await self._changed(user)
        finally:
            del self._telling[user]

    async def warnings(self, user: str) -> Sequence[str]:
        """See ``Credentials``."""
        told = []
        providers = self._config().gateway.providers
        for facts in await self._vault.list(user) if user else ():
            entry = providers.get(facts.provider)
            if facts.problem:
                told.append(
                    f"the credential for {facts.provider} could not be renewed: {facts.problem}; if it stays so, sign "
                    f"in again and store it: cortex user credential set"
                )
            elif facts.kind == "oauth" and entry is not None and not entry.oauth.token_url:
                told.append(
                    f"the token set for {facts.provider} is not used: [gateway.providers.{facts.provider}.oauth] is off"
                )
        return told

    def start(self) -> None:
        """Begins to renew token sets ahead of time."""
        self.refresher.start()

    async def close(self) -> None:
        """Lets go; see ``Refresher.close``."""
        await self.refresher.close()
        await self._tasks.close()


def _bearer(entry: Entry, provider: ProviderConfig) -> Credential:
    tokens = entry.secret.value
    if not isinstance(tokens, Mapping):
        # Meanwhile another kind was stored, which is told as a change of its own.
        return Credential()
    account = str(tokens.get("account_id", ""))
    filled = {name: value.replace("{account_id}", account) for name, value in provider.oauth.headers.items()}
    return Credential(str(tokens["access_token"]), "bearer", {name: value for name, value in filled.items() if value})
