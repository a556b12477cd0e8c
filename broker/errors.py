"""The one family of errors: every failure that a user or operator can meet has a code and a hint.

``CortexError`` is raised everywhere; ``Code`` says how it looks at each edge: the HTTP status of
its problem details (RFC 9457), the WebSocket close code (RFC 6455 section 7.4, private range
4000-4999) and whether trying again later may help.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any


class Code(Enum):
    """A stable error code: ``(slug, HTTP status, WebSocket close code, retryable)``."""

    BAD_REQUEST = ("request.invalid", 400, 4400, False)
    BODY_TOO_LARGE = ("request.too_large", 413, 1009, False)
    NOT_FOUND = ("request.not_found", 404, 4400, False)
    UNKNOWN_SECTION = ("config.unknown_section", 404, 4400, False)
    BAD_SECTION = ("config.invalid_section", 422, 4400, False)
    BAD_CONFIG = ("config.invalid", 500, 1011, False)
    BAD_USER_ID = ("user.invalid_id", 400, 4400, False)
    UNKNOWN_AGENT = ("agent.unknown", 422, 4400, False)

    TOKEN_MISSING = ("token.missing", 401, 4401, False)
    TOKEN_INVALID = ("token.invalid", 401, 4401, False)
    TOKEN_EXPIRED = ("token.expired", 401, 4401, False)
    TOKEN_REVOKED = ("token.revoked", 401, 4401, False)
    ORIGIN_FORBIDDEN = ("origin.forbidden", 403, 4403, False)
    HOST_FORBIDDEN = ("host.forbidden", 403, 4403, False)
    ADMIN_REQUIRED = ("access.admin_required", 401, 4401, False)
    FORBIDDEN = ("access.forbidden", 403, 4403, False)
    HOOK_SIGNATURE = ("hook.bad_signature", 401, 4401, False)
    HOOK_EXPIRED = ("hook.outside_tolerance", 401, 4401, False)
    HOOK_CONFLICT = ("hook.id_reused", 409, 4409, False)

    NO_SESSION = ("session.not_found", 404, 4400, False)
    SESSION_CONFLICT = ("session.conflict", 409, 4409, False)
    SESSION_BUSY = ("session.too_many_clients", 429, 4429, True)
    SESSION_STOPPED = ("session.stopped", 409, 1001, True)
    BRINGUP_TIMEOUT = ("session.bringup_timeout", 504, 1013, True)
    MAILBOX_FULL = ("session.overloaded", 503, 1013, True)
    WRONG_PROTOCOL = ("session.wrong_protocol", 409, 4400, False)

    ENGINE_DOWN = ("sandbox.engine_down", 503, 1013, True)
    ENGINE_TIMEOUT = ("sandbox.engine_timeout", 503, 1013, True)
    ENGINE_ERROR = ("sandbox.engine_error", 502, 1013, True)
    IMAGE_MISSING = ("sandbox.image_missing", 503, 1011, False)
    ISOLATION_MISSING = ("sandbox.isolation_missing", 503, 1011, False)
    SANDBOX_DIED = ("sandbox.died", 502, 1011, True)
    SANDBOX_PROTOCOL = ("sandbox.protocol_violation", 502, 1011, True)
    AGENT_MISSING = ("agent.not_in_image", 502, 1011, False)
    AGENT_FAILED = ("agent.failed", 502, 1011, True)
    PACKAGE_FAILED = ("package.install_failed", 502, 1011, True)

    FRAME_INVALID = ("frame.invalid", 400, 1002, False)
    FRAME_TOO_BIG = ("frame.too_big", 413, 1009, False)
    SLOW_CONSUMER = ("client.slow_consumer", 408, 4408, True)
    SUPERSEDED = ("client.superseded", 409, 4409, False)

    BAD_CREDENTIAL = ("credential.invalid", 422, 4400, False)
    NO_CREDENTIAL = ("credential.not_found", 404, 4400, False)
    VAULT_KEY = ("vault.key_unusable", 500, 1011, False)
    VAULT_KEY_READ_ONLY = ("vault.key_read_only", 409, 4409, False)
    VAULT_TAMPERED = ("vault.tampered", 500, 1011, False)

    DISK_FULL = ("store.disk_full", 507, 1013, True)
    STORE_LOCKED = ("store.locked", 503, 1011, False)
    STORE_ERROR = ("store.error", 500, 1011, True)
    RESTARTING = ("broker.restarting", 503, 1012, True)
    UNREACHABLE = ("broker.unreachable", 503, 1013, True)
    GATEWAY_DOWN = ("gateway.down", 503, 1013, True)
    GATEWAY_UNCLAIMED = ("gateway.unclaimed", 503, 1013, True)
    GATEWAY_BUSY = ("gateway.too_many_connections", 429, 4429, True)
    UNKNOWN_PROVIDER = ("gateway.unknown_provider", 404, 4400, False)
    NO_WEBSOCKET = ("gateway.no_websocket", 426, 4400, False)
    UPSTREAM_UNREACHABLE = ("gateway.upstream_unreachable", 502, 1013, True)
    UPSTREAM_FAILED = ("gateway.upstream_failed", 502, 1013, True)
    UPSTREAM_TIMEOUT = ("gateway.upstream_timeout", 504, 1013, True)
    UPSTREAM_BUSY = ("gateway.upstream_busy", 503, 1013, True)
    GATEWAY_LIMITED = ("gateway.limited", 429, 4429, True)
    BUDGET_SPENT = ("gateway.budget_spent", 429, 4429, False)
    EGRESS_LIMIT = ("egress.limit", 429, 4429, True)
    EGRESS_DENIED = ("egress.denied", 403, 4403, False)
    EGRESS_ADDRESS = ("egress.address_refused", 403, 4403, False)
    HEAD_TOO_LARGE = ("request.head_too_large", 431, 4400, False)
    BAD_METHOD = ("request.method_not_allowed", 405, 4400, False)
    REQUEST_TIMEOUT = ("request.timeout", 408, 4400, True)
    HTTP_VERSION = ("request.http_version", 505, 4400, False)
    INTERNAL = ("broker.internal", 500, 1011, True)

    def __init__(self, slug: str, http_status: int, close_code: int, retryable: bool) -> None:
        self.slug = slug
        self.http_status = http_status
        self.close_code = close_code
        self.retryable = retryable


def code_of(slug: str, default: Code) -> Code:
    """The code with that slug, as it came from a peer."""
    return next((code for code in Code if code.slug == slug), default)


class CortexError(Exception):
    """What went wrong (``what``), why (``cause``) and what to do about it (``hint``).

    ``details`` holds JSON-safe facts for programs (field names, limits); never a secret.
    """

    def __init__(
        self,
        code: Code,
        what: str,
        *,
        hint: str,
        cause: BaseException | str | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(what)
        self.code = code
        self.what = what
        self.hint = hint
        self.cause = cause
        self.details = dict(details or {})

    def __str__(self) -> str:
        why = f" ({self.cause})" if self.cause else ""
        return f"{self.what}{why} [{self.code.slug}]"

    def problem(self) -> dict[str, Any]:
        """Problem details, RFC 9457, with ``code`` and ``hint`` as extension members."""
        body: dict[str, Any] = {
            "type": "about:blank",
            "title": self.what,
            "status": self.code.http_status,
            "code": self.code.slug,
            "hint": self.hint,
            "retryable": self.code.retryable,
        }
        if self.cause:
            body["detail"] = str(self.cause)
        if self.details:
            body["details"] = self.details
        return body

    @classmethod
    def from_problem(cls, told: object) -> CortexError:
        """The error that problem details were made from, as far as a peer tells it."""
        facts: dict[str, Any] = told if isinstance(told, dict) else {}
        details = facts.get("details")
        return cls(
            code_of(str(facts.get("code")), Code.INTERNAL),
            str(facts.get("title") or "the broker refused"),
            hint=str(facts.get("hint") or "see the broker's log"),
            cause=facts.get("detail"),
            details=details if isinstance(details, dict) else None,
        )

    def close_reason(self) -> str:
        """A close frame's reason: at most 123 bytes of UTF-8 (RFC 6455 section 5.5)."""
        text = f"{self.code.slug}: {self.hint}"
        return text.encode()[:123].decode(errors="ignore")
