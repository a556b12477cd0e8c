"""Who may do what: attach tokens, single-use tickets, origins, hosts, the admin token, hook signatures.

A token names its user in clear (so that any broker can tell whose it is) and is otherwise 256 bits
of randomness; the store keeps only its SHA-256. Comparisons of secrets take constant time.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from broker.config import USER_ID, Config
from broker.errors import Code, CortexError
from broker.store.tokens import Receipt, TokenStore

PREFIX = "cx1."
MAX_TOKEN = 512
"""Longest token that is looked at, in characters."""
TICKET_TTL_S = 30.0
MAX_TICKETS = 10_000
HOOK_TOLERANCE_S = 300
MAX_SIGNATURES = 16
RECEIPT_LIFE_S = 3 * 86_400.0
"""How long a hook's first answer can be had again; senders retry for hours."""
PRUNE_EVERY_S = 600.0
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::[0-9]{1,5})?")


@dataclass(frozen=True)
class Grant:
    """What a token or ticket allows: attaching to one session until ``expires_at`` (Unix seconds)."""

    user: str
    workspace: str
    expires_at: float


@dataclass(frozen=True)
class Minted:
    """A fresh secret; the only time it is seen."""

    token: str
    expires_at: float


@dataclass(frozen=True)
class HookCall:
    """A hook whose signature is good. ``sent_at``: Unix seconds of this attempt."""

    id: str
    sent_at: int
    body_hash: bytes


def check_user_id(text: str, what: str = "user id") -> str:
    """``text`` if it is a user id or workspace name. Raises ``BAD_USER_ID``."""
    if not USER_ID.fullmatch(text):
        raise CortexError(
            Code.BAD_USER_ID,
            f"{text[:64]!r} is not a {what}",
            hint="use 1 to 128 letters, digits and . _ @ + : | -, beginning with a letter or digit",
        )
    return text


def format_token(user: str, workspace: str, secret: bytes) -> str:
    """The token text; ``secret`` is 32 bytes."""
    return f"{PREFIX}{_b64(f'{user}/{workspace}'.encode())}.{_b64(secret)}"


def parse_token(token: str) -> tuple[str, str]:
    """User and workspace that a token names; says nothing about whether it is good. Raises ``TOKEN_INVALID``."""
    if len(token) > MAX_TOKEN or not token.startswith(PREFIX):
        raise _invalid()
    name, _, secret = token[len(PREFIX) :].partition(".")
    try:
        user, _, workspace = base64.urlsafe_b64decode(name + "=" * (-len(name) % 4)).decode().partition("/")
    except (ValueError, binascii.Error) as error:
        raise _invalid() from error
    if len(secret) != 43 or not USER_ID.fullmatch(user) or not USER_ID.fullmatch(workspace):
        raise _invalid()
    return user, workspace


def verify_hook(keys: Sequence[bytes], headers: Mapping[str, str], body: bytes, now: float) -> HookCall:
    """Checks a Standard Webhooks 1.0 signature over the raw body: ``v1,`` base64 of HMAC-SHA256 of
    ``id.timestamp.body``; any of ``keys`` and of the signatures will do (rotation).

    Raises ``HOOK_SIGNATURE`` or, more than 5 minutes from ``now``, ``HOOK_EXPIRED``.
    """
    hook_id = headers.get("webhook-id", "")
    stamp = headers.get("webhook-timestamp", "")
    given = headers.get("webhook-signature", "").split(" ")[:MAX_SIGNATURES]
    good_id = hook_id.isascii() and hook_id.isprintable() and 0 < len(hook_id) <= 256 and "." not in hook_id
    if not good_id or not (stamp.isascii() and stamp.isdigit()):
        raise _bad_signature("webhook-id or webhook-timestamp is missing or malformed")
    signed = f"{hook_id}.{stamp}.".encode() + body
    good = [b"v1," + base64.b64encode(hmac.digest(key, signed, "sha256")) for key in keys]
    matches = [hmac.compare_digest(ours, text.encode(errors="replace")) for ours in good for text in given]
    if not any(matches):
        raise _bad_signature("no signature matches")
    if len(stamp) > 12 or abs(now - int(stamp)) > HOOK_TOLERANCE_S:
        raise CortexError(
            Code.HOOK_EXPIRED,
            f"webhook-timestamp is more than {HOOK_TOLERANCE_S} s from this host's clock",
            hint="sign each attempt with the current time; check both clocks",
        )
    return HookCall(id=hook_id, sent_at=int(stamp), body_hash=hashlib.sha256(body).digest())


class Access:
    """Tokens, tickets and the checks at every edge. ``config`` gives the tree of the moment."""

    def __init__(
        self,
        tokens: TokenStore,
        config: Callable[[], Config],
        installation_key: bytes,
        clock: Callable[[], float] = time.time,
        *,
        admin_token: str = "",
        hook_keys: Sequence[bytes] = (),
    ) -> None:
        self._tokens = tokens
        self._config = config
        self._hook_token_key = hmac.digest(installation_key, b"cortex hook token 1", "sha256")
        self._clock = clock
        self._admin_token = admin_token
        self._hook_keys = tuple(hook_keys)
        self._tickets: dict[bytes, Grant] = {}
        self._pruned_at = clock()

    async def mint(self, user: str, workspace: str, ttl_s: float | None = None) -> Minted:
        """An attach token; ``ttl_s`` default and upper bound of a day: ``session.token_ttl_s``."""
        return await self._keep(user, workspace, secrets.token_bytes(32), self._clock() + self.ttl(ttl_s))

    async def hook_seen(self, call: HookCall) -> bool:
        """Whether this call was answered before. Raises ``HOOK_CONFLICT`` when its id came with another body."""
        receipt = await self._tokens.receipt_get(call.id)
        if receipt is not None:
            _same_body(call, receipt)
        return receipt is not None

    async def mint_for_hook(self, call: HookCall, user: str, workspace: str) -> Minted:
        """The token of one hook call: derived, so every replay is told the same without it being stored.

        Raises ``HOOK_CONFLICT`` when the id came before with another body.
        """
        first_at = await self._first_seen(call, user, workspace)
        named = f"{call.id}.{user}/{workspace}".encode()
        secret = hmac.digest(self._hook_token_key, named, "sha256")
        return await self._keep(user, workspace, secret, first_at + self.ttl(None))

    async def admit_hook(self, call: HookCall, user: str, workspace: str) -> None:
        """Records a call that needs no token. Raises ``HOOK_CONFLICT`` as ``mint_for_hook``."""
        await self._first_seen(call, user, workspace)

    def ttl(self, wanted: float | None) -> float:
        """Seconds that a token lives: ``wanted``, a day at most; else the configured life."""
        return self._config().session.token_ttl_s if wanted is None else min(max(wanted, 1.0), 86_400.0)

    async def verify(self, token: str) -> Grant:
        """One read of the store. Raises ``TOKEN_MISSING``, ``_INVALID``, ``_EXPIRED`` or ``_REVOKED``."""
        if not token:
            raise CortexError(
                Code.TOKEN_MISSING,
                "no token was sent",
                hint="send Authorization: Bearer TOKEN, the subprotocol bearer.TOKEN, or ?ticket=",
            )
        named = parse_token(token)
        row = await self._tokens.get(_digest(token))
        if row is None or (row.user, row.workspace) != named:
            raise _invalid()
        if row.revoked:
            raise CortexError(Code.TOKEN_REVOKED, "the token was revoked", hint="ask the web app for a new one")
        if row.expires_at <= self._clock():
            raise CortexError(
                Code.TOKEN_EXPIRED,
                "the token has expired",
                hint="ask the web app for a new one, or: cortex token create USER",
            )
        return Grant(row.user, row.workspace, row.expires_at)

    def issue_ticket(self, user: str, workspace: str) -> Minted:
        """A single-use ticket for ``?ticket=``, good for 30 s; kept in memory only."""
        now = self._clock()
        self._tickets = {key: grant for key, grant in self._tickets.items() if grant.expires_at > now}
        if len(self._tickets) >= MAX_TICKETS:
            raise CortexError(Code.MAILBOX_FULL, "too many open tickets", hint="try again in 30 s")
        token = format_token(user, workspace, secrets.token_bytes(32))
        self._tickets[_digest(token)] = Grant(user, workspace, now + TICKET_TTL_S)
        return Minted(token, now + TICKET_TTL_S)

    async def redeem(self, ticket: str) -> Grant:
        """Uses a ticket up. Raises ``TOKEN_INVALID`` (also the second time) or ``TOKEN_EXPIRED``."""
        parse_token(ticket)
        grant = self._tickets.pop(_digest(ticket), None)
        if grant is None:
            raise CortexError(
                Code.TOKEN_INVALID, "the ticket is unknown or was used", hint="a ticket works once; ask for a new one"
            )
        if grant.expires_at <= self._clock():
            raise CortexError(Code.TOKEN_EXPIRED, "the ticket has expired", hint="connect within 30 s of asking for it")
        return grant

    async def revoke(self, user: str, workspace: str) -> int:
        """Revokes every token and ticket of a session; returns how many. Closing live clients is the caller's."""
        tickets = [key for key, grant in self._tickets.items() if (grant.user, grant.workspace) == (user, workspace)]
        for key in tickets:
            del self._tickets[key]
        return len(tickets) + await self._tokens.revoke(user, workspace)

    def check_origin(self, origin: str | None) -> None:
        """A request without Origin is no browser's and passes. Raises ``ORIGIN_FORBIDDEN``."""
        if origin is not None and origin not in self._config().front.allowed_origins:
            raise CortexError(
                Code.ORIGIN_FORBIDDEN,
                f"pages of {origin[:128]!r} may not connect",
                hint="add the exact origin (scheme://host:port) to front.allowed_origins",
            )

    def check_host(self, host: str | None) -> None:
        """Against ``front.allowed_hosts``. Raises ``HOST_FORBIDDEN``."""
        check_host(host, self._config().front.allowed_hosts, "front.allowed_hosts")

    def check_control_host(self, host: str | None) -> None:
        """Against ``control.allowed_hosts``. Raises ``HOST_FORBIDDEN``."""
        check_host(host, self._config().control.allowed_hosts, "control.allowed_hosts")

    def check_admin(self, authorization: str | None) -> None:
        """Checks an ``Authorization`` header against the admin token. Raises ``ADMIN_REQUIRED``."""
        scheme, _, given = (authorization or "").partition(" ")
        same = hmac.compare_digest(given.strip().encode(errors="replace"), self._admin_token.encode())
        if scheme.lower() != "bearer" or not self._admin_token or not same:
            raise CortexError(
                Code.ADMIN_REQUIRED,
                "this route is for operators",
                hint="send Authorization: Bearer with the contents of control.admin_token_file",
            )

    def verify_hook(self, headers: Mapping[str, str], body: bytes) -> HookCall:
        """``verify_hook`` with this installation's keys and clock."""
        return verify_hook(self._hook_keys, headers, body, self._clock())

    async def _first_seen(self, call: HookCall, user: str, workspace: str) -> float:
        """When this hook came first, Unix seconds."""
        now = self._clock()
        if await self._tokens.receipt_put(call.id, user, workspace, call.body_hash, now):
            return now
        receipt = await self._tokens.receipt_get(call.id)
        if receipt is None:
            return now
        _same_body(call, receipt)
        return receipt.at

    async def _prune(self) -> None:
        """Forgets what has long expired; now and then, on the back of a call that writes anyway."""
        now = self._clock()
        if abs(now - self._pruned_at) > PRUNE_EVERY_S:
            self._pruned_at = now
            await self._tokens.prune(now - PRUNE_EVERY_S)
            await self._tokens.receipts_prune(now - RECEIPT_LIFE_S)

    async def _keep(self, user: str, workspace: str, secret: bytes, expires_at: float) -> Minted:
        token = format_token(check_user_id(user), check_user_id(workspace, "workspace name"), secret)
        await self._tokens.put(_digest(token), user, workspace, expires_at)
        await self._prune()
        return Minted(token, expires_at)


def check_host(host: str | None, allowed: Sequence[str], key: str) -> None:
    """Names without port are compared, case aside; against DNS rebinding. Raises ``HOST_FORBIDDEN``."""
    match = _HOST.fullmatch(host.lower()) if host else None
    if match is None or all(match[1] != entry.lower() for entry in allowed):
        raise CortexError(
            Code.HOST_FORBIDDEN,
            f"the request names host {(host or '')[:128]!r}",
            hint=f"add the name that clients use to {key}",
        )


def _same_body(call: HookCall, receipt: Receipt) -> None:
    if not hmac.compare_digest(receipt.body_hash, call.body_hash):
        raise CortexError(
            Code.HOOK_CONFLICT,
            f"webhook-id {call.id[:64]!r} came before with another body",
            hint="give every event an id of its own; retries repeat id and body",
        )


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="replace")).digest()


def _invalid() -> CortexError:
    return CortexError(
        Code.TOKEN_INVALID,
        "the token is not one of this broker's",
        hint="send the whole token, as it was given by POST /v1/sessions or the hook",
    )


def _bad_signature(why: str) -> CortexError:
    return CortexError(
        Code.HOOK_SIGNATURE,
        "the hook is not signed with a secret of this broker",
        cause=why,
        hint="sign the raw body by Standard Webhooks with a secret of control.hook_secrets_file",
    )
