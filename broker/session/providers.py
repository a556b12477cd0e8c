"""Which providers a session's sandbox may call, with their credentials: what the gateway is told.

Credentials come from ``credential_file`` of [gateway.providers]; per-user ones will come through
the same ``Credentials`` port.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from broker.config import Config, ProviderConfig
from broker.errors import Code, CortexError
from broker.gateway.link import Egress, GatewayLink, Provider
from broker.session.sections import ProviderChoice, SandboxConfig

MAX_CREDENTIAL = 16 * 2**10


class Credentials(Protocol):
    """Where credentials come from."""

    async def get(self, user: str, name: str, provider: ProviderConfig) -> str:
        """The credential of ``user`` for provider ``name``; "" when there is none. Raises ``CortexError``."""


class FileCredentials:
    """One credential a provider, from a file of the operator's, read again when it changed."""

    def __init__(self) -> None:
        self._read: dict[str, tuple[tuple[int, int], str]] = {}

    async def get(self, user: str, name: str, provider: ProviderConfig) -> str:
        if not provider.credential_file:
            return ""
        return await asyncio.to_thread(self._load, name, Path(provider.credential_file))

    def _load(self, name: str, path: Path) -> str:
        try:
            info = path.stat()
            stamp = (info.st_mtime_ns, info.st_ino)
            known = self._read.get(str(path))
            if known is not None and known[0] == stamp:
                return known[1]
            value = path.read_text()[:MAX_CREDENTIAL].strip()
        except (OSError, UnicodeDecodeError) as error:
            raise CortexError(
                Code.BAD_CONFIG,
                f"the credential of provider {name} cannot be read",
                cause=error if isinstance(error, OSError) else "it is not text",
                hint=f"put the key into gateway.providers.{name}.credential_file, readable by the broker only",
            ) from error
        self._read[str(path)] = (stamp, value)
        return value


async def providers_for(
    config: Config, credentials: Credentials, user: str, choices: Mapping[str, ProviderChoice]
) -> dict[str, Provider]:
    """Every configured provider by name; a user's ``use`` makes one stand in for another."""
    table = {}
    for name in config.gateway.providers:
        choice = choices.get(name)
        source = choice.use if choice and choice.use in config.gateway.providers else name
        entry = config.gateway.providers[source]
        ca = await asyncio.to_thread(_read_ca, source, Path(entry.ca_file)) if entry.ca_file else ""
        credential = await credentials.get(user, source, entry)
        table[name] = Provider(entry.kind, entry.base_url, credential, ca)
    return table


def _read_ca(name: str, path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise CortexError(
            Code.BAD_CONFIG,
            f"the CA bundle of provider {name} cannot be read",
            cause=error if isinstance(error, OSError) else "it is not text",
            hint=f"put a PEM bundle into gateway.providers.{name}.ca_file",
        ) from error


def egress_for(config: Config, user: SandboxConfig) -> Egress:
    """The user's own hosts; nothing else by default."""
    return Egress(user.egress.hosts, config.gateway.private_hosts)


class BuilderNetwork:
    """What package builders may reach: the hosts of ``gateway.allowed_hosts``, no provider."""

    def __init__(self, gateway: GatewayLink, config: Callable[[], Config]) -> None:
        self._gateway = gateway
        self._config = config

    async def put_builder(self, slot: str, incarnation: int, fds: tuple[int, int]) -> None:
        """Serves a builder's slot."""
        gateway = self._config().gateway
        egress = Egress(gateway.allowed_hosts, gateway.private_hosts)
        await self._gateway.put_slot(slot, incarnation, {"user": "", "role": "builder"}, {}, egress, fds)

    async def drop_slot(self, slot: str) -> None:
        """Cuts it off."""
        await self._gateway.drop_slot(slot)
