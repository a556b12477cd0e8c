"""Which providers a session's sandbox may call, with their credentials: what the gateway is told.

Credentials come through the ``Credentials`` port: ``credential_file`` of [gateway.providers] here,
those of users in ``session.credentials``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from broker.config import DEMO_AGENT, AgentConfig, Config, ProviderConfig
from broker.errors import Code, CortexError
from broker.gateway.link import Egress, GatewayLink, Provider, Scheme
from broker.session.ecosystems import hosts_of
from broker.session.sections import ProviderChoice, SandboxConfig

MAX_CREDENTIAL = 16 * 2**10


@dataclass(frozen=True)
class Credential:
    """What authenticates calls. ``value`` "": nothing; ``headers`` go along with it."""

    value: str = field(default="", repr=False)
    scheme: Scheme = "key"
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)


class Credentials(Protocol):
    """Where credentials come from. Every method may raise ``CortexError``."""

    async def get(self, user: str, name: str, provider: ProviderConfig) -> Credential:
        """The credential of ``user`` for provider ``name``."""

    async def files(self, user: str, agent_name: str, agent: AgentConfig) -> list[dict[str, Any]]:
        """The agent's own credential files, as the part ``files`` of a bind."""

    async def refreshed(
        self, user: str, agent: AgentConfig, path: str, content: bytes, after: Sequence[str] = ()
    ) -> None:
        """The agent has changed the file that was bound at ``path``: kept for the user's next sandbox.

        ``after``: see ``wire.messages.Refreshed``; what was made of another than the user has now is dropped.
        """

    async def warnings(self, user: str) -> Sequence[str]:
        """What is wrong with the user's credentials, for people."""


class SecretFiles:
    """Secrets in files of the operator's, read again when one changed."""

    def __init__(self) -> None:
        self._read: dict[str, tuple[tuple[int, int], str]] = {}

    def load(self, whose: str, setting: str, path: Path) -> str:
        """The text of ``path``, as ``setting`` has it. Raises ``BAD_CONFIG``."""
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
                f"the credential of {whose} cannot be read",
                cause=error if isinstance(error, OSError) else "it is not text",
                hint=f"put it into the file that {setting} names, readable by the broker only",
            ) from error
        self._read[str(path)] = (stamp, value)
        return value


class FileCredentials:
    """One credential a provider, from a file of the operator's, read again when it changed."""

    def __init__(self) -> None:
        self._secrets = SecretFiles()

    async def get(self, user: str, name: str, provider: ProviderConfig) -> Credential:
        if not provider.credential_file:
            return Credential()
        path = Path(provider.credential_file)
        setting = f"gateway.providers.{name}.credential_file"
        return Credential(await asyncio.to_thread(self._secrets.load, f"provider {name}", setting, path))

    async def files(self, user: str, agent_name: str, agent: AgentConfig) -> list[dict[str, Any]]:
        return []

    async def refreshed(
        self, user: str, agent: AgentConfig, path: str, content: bytes, after: Sequence[str] = ()
    ) -> None:
        """Nothing is bound, so nothing can have changed."""

    async def warnings(self, user: str) -> Sequence[str]:
        return ()


async def providers_for(
    config: Config, credentials: Credentials, user: str, choices: Mapping[str, ProviderChoice]
) -> dict[str, Provider]:
    """Every configured provider by name; a user's ``use`` makes one stand in for another."""
    table = {}
    for name in config.gateway.providers:
        choice = choices.get(name)
        source = choice.use if choice and choice.use in config.gateway.providers else name
        entry = config.gateway.providers[source]
        ca = await asyncio.to_thread(read_ca, source, Path(entry.ca_file)) if entry.ca_file else ""
        found = await credentials.get(user, source, entry)
        table[name] = Provider(
            entry.kind, entry.servers[0], found.value, ca, scheme=found.scheme, headers=dict(found.headers),
            policy=source,
        )  # fmt: skip
    return table


def read_ca(name: str, path: Path) -> str:
    """The PEM bundle of a provider. Raises ``BAD_CONFIG``."""
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise CortexError(
            Code.BAD_CONFIG,
            f"the CA bundle of provider {name} cannot be read",
            cause=error if isinstance(error, OSError) else "it is not text",
            hint=f"put a PEM bundle into gateway.providers.{name}.ca_file",
        ) from error


def egress_for(config: Config, agent: str, user: SandboxConfig) -> Egress:
    """The hosts of the agent's settings and the user's own, with those of their ecosystems; none by default. An
    agent that config.toml has no longer allows nothing."""
    own = config.agents.get(agent, DEMO_AGENT)
    ready = hosts_of((*own.egress_ecosystems, *user.egress.ecosystems))
    hosts = dict.fromkeys((*own.egress_hosts, *user.egress.hosts, *ready))
    return Egress(tuple(hosts), config.gateway.private_hosts)


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
