"""What a sandbox should have, in parts that are hashed and sent on their own.

``boot`` is what the sandbox is made with (a change needs a new one), ``process`` what the agent
reads when it starts, ``mcp``, ``settings`` and ``files`` what a running agent server takes. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from broker.config import AgentConfig, Config
from broker.session.fingerprint import fingerprint, fingerprints
from broker.session.sections import SandboxConfig
from sandbox_agent.wire.messages import AgentSpec

BOUND = ("process", "mcp", "settings", "files")
"""Parts that travel in a ``bind``."""
KINDS = {"process": "settings", "settings": "settings", "mcp": "mcp", "files": "credentials"}
"""Metric label of each part."""


@dataclass(frozen=True)
class Wanted:
    """Values and hashes by part.

    ``program``: the operator's words of the agent's command; the paths of the host that a sandbox may be
    shown come from these alone, never from what a user adds to them.
    """

    agent: AgentSpec
    values: Mapping[str, Any] = field(repr=False)
    hashes: Mapping[str, str]
    program: tuple[str, ...] = ()

    @property
    def bound_hashes(self) -> dict[str, str]:
        """Hashes of the parts that travel in a ``bind``."""
        return {name: self.hashes[name] for name in BOUND}


def agent_spec(
    name: str,
    agent: AgentConfig,
    user: SandboxConfig,
    *,
    home: str,
    init_timeout_s: float,
    own_credential: bool = False,
) -> AgentSpec:
    """The agent's command with the user's environment, options and model laid over the operator's.

    ``own_credential``: it finds one in a file, so placeholders must not stand before it.
    """
    options = user.settings.agent.get(name)
    given = {**agent.env, **agent.credential_env} if own_credential else agent.env
    given = {key: value for key, value in given.items() if value or key not in agent.credential_env}
    env = {**given, **user.env, **(options.env if options else {})}
    command = [*agent.command, *(options.args if options else ())]
    model = user.settings.model or agent.model
    if model:
        env |= {key: value.replace("{model}", model) for key, value in agent.model_env.items()}
        command += [word.replace("{model}", model) for word in agent.model_args]
    return AgentSpec(
        name=name,
        protocol=agent.protocol,
        command=command,
        env=env,
        files=dict(agent.files),
        # An agent that outlives a change of its home stands in neither of them.
        cwd="/" if agent.prewarm == "agent" else workspace_of(home, user),
        init_timeout_s=init_timeout_s,
        max_restarts=agent.max_restarts,
        live_mcp=agent.live_mcp,
    )


def workspace_of(home: str, user: SandboxConfig) -> str:
    """The workspace's directory in the sandbox."""
    return f"{home}/{user.workspace.path}"


def boot_hash(key: bytes, user: SandboxConfig, image: str) -> str:
    """Hash of what a sandbox is made with; ``image``: what the driver runs sandboxes from."""
    return fingerprint(key, "boot", _boot(user, image))


def _boot(user: SandboxConfig, image: str) -> dict[str, Any]:
    return {"image": image, "limits": user.limits.model_dump(), "plugins": user.plugins.model_dump(mode="json")}


def wanted(
    key: bytes,
    config: Config,
    agent_name: str,
    user: SandboxConfig,
    *,
    home: str,
    image: str,
    mcp: Sequence[Mapping[str, Any]],
    files: Sequence[Mapping[str, Any]] = (),
    generic: bool = False,
) -> Wanted:
    """All parts for a session, or for a warm sandbox that is nobody's (``generic``). ``mcp``: the servers that can
    be started now, as ACP objects; ``image``: what the driver runs sandboxes from; ``files``: the agent's own
    credential files."""
    spec = agent_spec(
        agent_name,
        config.agents[agent_name],
        user,
        home=home,
        init_timeout_s=config.session.agent_init_timeout_s,
        own_credential=bool(files),
    )
    values: dict[str, Any] = {
        "boot": _boot(user, image),
        "process": spec.encode(),
        "mcp": [dict(server) for server in mcp],
        "settings": {
            "allow_client_mcp": user.settings.allow_client_mcp,
            "permission_policy": user.settings.permission_policy,
            "workspace": workspace_of(home, user),
            "open_ahead": config.agents[agent_name].open_ahead
            in (("new", "any") if generic else ("own", "new", "any")),
        },
        "files": [dict(file) for file in files],
    }
    return Wanted(spec, values, fingerprints(key, values), tuple(config.agents[agent_name].command))


def servers(user: SandboxConfig) -> list[dict[str, Any]]:
    """The user's MCP servers as ACP ``McpServer`` objects, by name."""
    return [server.acp(name) for name, server in sorted(user.mcp.servers.items())]
