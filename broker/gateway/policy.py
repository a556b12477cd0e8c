"""How calls to one provider are treated, as the broker tells the gateway process. Pure.

Same names, values and units as [gateway.providers.NAME] of config.toml, which is where each is described.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

Kind = Literal["anthropic", "openai", "gemini", "ollama"]


class Limit(msgspec.Struct, frozen=True, kw_only=True):
    """0: no limit."""

    concurrency: int = 0
    interval_s: float = 0.0
    rpm: int = 0
    tpm: int = 0

    @property
    def any(self) -> bool:
        """Something is limited."""
        return bool(self.concurrency or self.interval_s or self.rpm or self.tpm)


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Each limit holds for itself: all calls of the provider, those with one credential, of one user or sandbox."""

    provider: Limit = Limit()
    credential: Limit = Limit()
    user: Limit = Limit()
    sandbox: Limit = Limit()
    waiting: int = 256
    wait_s: float = 30.0


class CacheRule(msgspec.Struct, frozen=True, kw_only=True):
    """Which answers of the provider are kept, and how long."""

    enabled: bool = False
    ttl_s: float = 300.0
    list_ttl_s: float = 60.0
    with_tools: bool = False
    with_randomness: bool = False
    max_entry_bytes: int = 2**20
    prewarm_file: str = ""


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """``upstreams``: base URLs; ``keys``: the operator's credentials, for slots that bring none."""

    kind: Kind
    upstreams: tuple[str, ...]
    keys: tuple[str, ...] = ()
    ca: str = ""
    websocket: bool = False
    keep_alive: bool = True
    prewarm: int = 0
    max_connections: int = 256
    max_fails: int = 5
    fail_timeout_s: float = 60.0
    health_path: str = ""
    health_interval_s: float = 10.0
    retries: int = 1
    retry_within_s: float = 15.0
    fallback: tuple[str, ...] = ()
    coalesce: bool = False
    batch_s: float = 0.0
    batch_size: int = 64
    preload: tuple[str, ...] = ()
    preload_keep_alive: str = "24h"
    limits: Limits = Limits()
    cache: CacheRule = CacheRule()

    def __repr__(self) -> str:
        return f"Policy({self.kind!r}, {self.upstreams!r})"


class CacheStore(msgspec.Struct, frozen=True, kw_only=True):
    """[gateway.cache]. ``redis_password`` "": none."""

    backend: Literal["memory", "redis"] = "memory"
    max_bytes: int = 64 * 2**20
    redis_url: str = ""
    redis_password: str = ""
    redis_timeout_s: float = 0.05

    def __repr__(self) -> str:
        return f"CacheStore({self.backend!r})"


def policies_from_wire(found: Mapping[str, Any]) -> dict[str, Policy]:
    """By provider's name. Raises ``ValueError``."""
    return msgspec.convert(dict(found), dict[str, Policy], strict=False)


def cache_from_wire(found: Mapping[str, Any]) -> CacheStore:
    """Raises ``ValueError``."""
    return msgspec.convert(dict(found), CacheStore, strict=False)
