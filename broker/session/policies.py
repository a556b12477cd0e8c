"""How calls to the operator's providers are treated, with the operator's keys: what the gateway is told once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import structlog

from broker.config import Config, ProviderConfig
from broker.errors import CortexError
from broker.gateway.link import GatewayLink
from broker.gateway.policy import CacheRule, CacheStore, Limit, Limits, Policy
from broker.gateway.routes import credential_line
from broker.host.tasks import TaskOwner
from broker.session.providers import SecretFiles, read_ca

LOOK_S = 5.0
"""Between looks at files of keys, which may be replaced at any time."""
log = structlog.get_logger(__name__)


class Policies:
    """Tells the gateway at ``start`` and whenever configuration or a key file changes."""

    def __init__(self, gateway: GatewayLink, config: Callable[[], Config], tasks: TaskOwner) -> None:
        self._gateway = gateway
        self._config = config
        self._tasks = tasks
        self._secrets = SecretFiles()
        self._changed = asyncio.Event()
        self._told: tuple[dict[str, Policy], CacheStore] | None = None

    async def start(self) -> None:
        """Tells them, then looks after them in a task."""
        await self._tell()
        self._tasks.start(self._run(), "policies")

    def settings_changed(self) -> None:
        """The configuration is another."""
        self._changed.set()

    async def _run(self) -> None:
        while True:
            try:
                await asyncio.wait_for(self._changed.wait(), LOOK_S if self._files() else None)
            except TimeoutError:
                log.debug("key_files_looked_at")
            self._changed.clear()
            await self._tell()

    def _files(self) -> bool:
        return any(provider.credential_files for provider in self._config().gateway.providers.values())

    async def _tell(self) -> None:
        gateway = self._config().gateway
        policies = {name: await self._policy(name, provider) for name, provider in gateway.providers.items()}
        cache = gateway.cache
        password = await self._secret(
            "the response cache", "gateway.cache.redis_password_file", cache.redis_password_file
        )
        store = CacheStore(
            backend=cache.backend, max_bytes=cache.max_bytes, redis_url=cache.redis_url,
            redis_password=password, redis_timeout_s=cache.redis_timeout_s,
        )  # fmt: skip
        if (policies, store) != self._told:
            self._told = policies, store
            self._gateway.set_policies(policies, store)

    async def _policy(self, name: str, provider: ProviderConfig) -> Policy:
        setting = f"gateway.providers.{name}.credential_files"
        keys = [await self._secret(f"provider {name}", setting, path) for path in provider.credential_files]
        ca = ""
        if provider.ca_file:
            try:
                ca = await asyncio.to_thread(read_ca, name, Path(provider.ca_file))
            except CortexError as error:
                log.error("ca_file_unreadable", provider=name, error=str(error))
        return policy_of(provider, tuple(key for key in keys if key and _fit(name, provider, key)), ca)

    async def _secret(self, whose: str, setting: str, path: str) -> str:
        """ "" where it cannot be read: the others still serve."""
        if not path:
            return ""
        try:
            return await asyncio.to_thread(self._secrets.load, whose, setting, Path(path))
        except CortexError as error:
            log.error("key_file_unreadable", setting=setting, error=str(error))
            return ""


def _fit(name: str, provider: ProviderConfig, key: str) -> bool:
    """The key can be sent. The gateway would refuse all policies for one that cannot."""
    try:
        credential_line(name, provider.kind, key)
    except CortexError as error:
        log.error("key_unusable", provider=name, error=str(error))
        return False
    return True


def policy_of(provider: ProviderConfig, keys: tuple[str, ...], ca: str) -> Policy:
    """A section of [gateway.providers] as the gateway process has it."""
    limits = provider.limits
    parts = {
        scope: Limit(**getattr(limits, scope).model_dump()) for scope in ("provider", "credential", "user", "sandbox")
    }
    cache = CacheRule(**provider.cache.model_dump())
    own = {name: getattr(provider, name) for name in Policy.__struct_fields__ if name not in _MADE}
    return Policy(
        **own, upstreams=provider.servers, keys=keys, ca=ca, cache=cache,
        limits=Limits(**parts, waiting=limits.waiting, wait_s=limits.wait_s),
    )  # fmt: skip


_MADE = ("upstreams", "keys", "ca", "cache", "limits")
