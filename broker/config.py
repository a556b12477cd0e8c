"""The settings tree: every key, its default and what it means, in one place.

Immutable: a reload builds and validates a new tree and swaps it for the old one. Reading files,
environment overrides and origins is ``broker.settings``. Durations are seconds, sizes bytes.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from broker.config_gateway import GatewayConfig, OAuthConfig, ProviderConfig
from broker.config_types import NAME, AgentName, Bytes, Ecosystem, HostRule, Seconds, Section

__all__ = ["NAME", "AgentName", "GatewayConfig", "OAuthConfig", "ProviderConfig", "Section"]


def _port(listen: str) -> str:
    """A resolver takes a larger port modulo 65536, so that one would listen elsewhere than told."""
    if not listen.startswith(("unix:", "systemd:")) and int(listen.rpartition(":")[2]) > 65_535:
        raise ValueError("a port is at most 65535")
    return listen


def _below_home(path: str) -> str:
    if path and (path.startswith("/") or not {"", ".", ".."}.isdisjoint(path.split("/")) or "\0" in path):
        raise ValueError("a path below HOME, such as .agent/auth.json")
    return path


Listen = Annotated[
    str,
    Field(pattern=r"^(unix:/.+|systemd:[A-Za-z0-9._-]+|\[?[A-Za-z0-9.:-]+\]?:[0-9]{1,5})$"),
    AfterValidator(_port),
]


class BrokerConfig(Section):
    state_dir: Path | None = Field(
        None, description="Durable state. Default: $STATE_DIRECTORY, else $XDG_STATE_HOME/cortex."
    )
    runtime_dir: Path | None = Field(
        None, description="Sockets. Default: $RUNTIME_DIRECTORY, else $XDG_RUNTIME_DIR/cortex."
    )
    node: str = Field("", description="This node's id, in labels and logs. Default: the host's name.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level that is logged.")
    log_format: Literal["auto", "json", "text"] = Field(
        "auto", description="auto: text on a terminal, JSON lines elsewhere."
    )
    drain_timeout_s: Seconds = Field(10.0, description="How long a stop waits for clients to take their close frame.")
    users_dir: Path | None = Field(
        None, description="Watched directory of per-user files USER/SECTION.toml. Default: {state_dir}/users."
    )


class FrontConfig(Section):
    listen: Listen = Field("127.0.0.1:8765", description="host:port, unix:PATH or systemd:NAME.")
    allowed_origins: tuple[str, ...] = Field((), description="Exact origins of web pages that may connect.")
    allowed_hosts: tuple[str, ...] = Field(
        ("127.0.0.1", "localhost", "[::1]"),
        description="Host names (without port) that a request may name.",
    )
    max_message_bytes: Bytes = Field(32 * 2**20, description="Largest message, over all its fragments.")
    max_clients_per_session: int = Field(128, ge=1, description="Clients attached to one session.")
    max_connections: int = Field(10_000, ge=1, description="Open connections, handshakes included.")
    handshake_timeout_s: Seconds = Field(10.0, description="From accept to a whole request head.")
    hold_bytes: Bytes = Field(2**20, description="What a client may send before its sandbox is ready.")
    write_high_bytes: Bytes = Field(256 * 2**10, description="Buffered bytes at which the other side is paused.")
    stall_timeout_s: Seconds = Field(30.0, description="A peer that takes no byte for so long is aborted.")
    ping_interval_s: Seconds = Field(20.0, description="Silence after which the broker pings a client.")
    ping_timeout_s: Seconds = Field(20.0, description="How long a pong may take.")


class ControlConfig(Section):
    listen: Listen = Field("127.0.0.1:8766", description="host:port, unix:PATH or systemd:NAME.")
    allowed_hosts: tuple[str, ...] = Field(
        ("127.0.0.1", "localhost", "[::1]"), description="Host names (without port) that a request may name."
    )
    admin_token_file: str = Field(
        "{state_dir}/admin.token", description="Bearer token of operators; made 0600 at first start."
    )
    hook_secrets_file: str = Field(
        "{state_dir}/hook.secrets",
        description="Standard Webhooks secrets (whsec_…), one a line; any of them verifies. Made at first start.",
    )
    max_body_bytes: Bytes = Field(2**20, description="Largest request body.")
    public_ws_url: str = Field("", description="What clients connect to, wss://host/acp. Default: from front.listen.")


class SessionConfig(Section):
    default_agent: AgentName = Field("demo", description="Agent of a session that names none.")
    token_ttl_s: Seconds = Field(900.0, description="Life of an attach token.")
    config_max_age_s: Seconds = Field(300.0, description="Age at which a cached configuration is refreshed.")
    config_url: str = Field(
        "", description="HTTP source of user configuration: GET {config_url}/{user}, JSON by section, ETag honoured."
    )
    config_url_token_file: str = Field("", description="File with the bearer token for config_url.")
    config_timeout_s: Seconds = Field(2.0, description="Deadline of each source.")
    bind_hold_s: Seconds = Field(2.0, description="Longest pause of client frames while a bind is applied.")
    bind_timeout_s: Seconds = Field(15.0, description="Deadline of a bind.")
    bringup_timeout_s: Seconds = Field(120.0, description="Deadline of a bring-up, package installs excluded.")
    agent_init_timeout_s: Seconds = Field(60.0, description="Deadline of the agent's initialize answer.")
    permission_policy: Literal["allow", "deny"] = Field(
        "deny", description="Answers permission requests of turns run over plain HTTP."
    )
    unload_after_s: Seconds = Field(600.0, description="A stopped session leaves memory after so long.")
    timeline_length: int = Field(8, ge=1, le=64, description="Bring-ups remembered per session.")
    journal_segment_bytes: Bytes = Field(16 * 2**20, description="Size of one journal file.")
    journal_segments: int = Field(4, ge=2, le=64, description="Journal files kept per session.")


class DockerConfig(Section):
    host: str = Field("", description="Engine address. Default: $DOCKER_HOST, else unix:///var/run/docker.sock.")
    image: str = Field("cortex-sandbox:latest", description="Sandbox image; see Dockerfile.sandbox.")
    runtime: str = Field("", description="OCI runtime, for example runsc. Default: the engine's.")
    memory_bytes: Bytes = Field(2 * 2**30, description="Memory limit.")
    cpus: float = Field(2.0, gt=0, description="CPU limit.")
    pids: int = Field(512, ge=16, description="Process limit.")
    tmp_bytes: Bytes = Field(512 * 2**20, description="Size of /tmp.")
    call_timeout_s: Seconds = Field(30.0, description="Deadline of an engine call.")


class ProcessConfig(Section):
    allow_unisolated: bool = Field(False, description="Run agents as plain children: one user, loopback, no isolation.")
    visible: tuple[str, ...] = Field((), description="More absolute paths that a sandbox sees, read-only.")
    path: str = Field(
        "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", description="PATH inside the sandbox."
    )


class SandboxSettings(Section):
    driver: Literal["docker", "process"] = Field("docker", description="docker or process; never a silent fallback.")
    uid: int = Field(0, ge=0, description="Numeric uid of sandboxes. 0: own uid as a developer, else 64321.")
    hello_timeout_s: Seconds = Field(30.0, description="From start to the agent server's hello.")
    stop_timeout_s: Seconds = Field(5.0, description="Grace before a sandbox is killed.")
    streams: int = Field(2, ge=1, le=16, description="Streams that an agent server keeps dialled ahead.")
    probe_interval_s: Seconds = Field(15.0, description="Health question to each agent server.")
    package_timeout_s: Seconds = Field(180.0, description="Deadline of one MCP package install.")
    package_scripts: tuple[str, ...] = Field((), description="Packages whose install scripts may run.")
    npm_registry: str = Field("", description="npm registry for MCP packages. Default: npm's own.")
    pip_index: str = Field("", description="Python index for MCP packages. Default: pip's own.")
    ca_file: str = Field("", description="Extra PEM bundle trusted inside sandboxes, for an inner registry.")
    docker: DockerConfig = DockerConfig()
    process: ProcessConfig = ProcessConfig()


class AgentConfig(Section):
    protocol: Literal["acp", "websocket"] = Field("acp", description="ACP on stdio, or the agent's own WebSocket.")
    command: tuple[str, ...] = Field(
        min_length=1,
        description="Command inside the sandbox. Filled in: {python}, {sandbox_agent}, {home}, {gateway}, "
        "{egress}, {port}.",
    )
    env: dict[str, str] = Field({}, description="Environment; the same placeholders.")
    files: dict[str, str] = Field({}, description="Files put under HOME where they do not exist yet.")
    provider: str = Field("", description="Model provider, a name in [gateway.providers].")
    model: str = Field(
        "",
        description="Model used where the user names none; empty: the agent's own choice; fastest: of models the one "
        "that begins to answer soonest.",
    )
    models: tuple[str, ...] = Field((), max_length=32, description="Models to choose from where model is fastest.")
    model_env: dict[str, str] = Field({}, description="Environment that names the model, as {model}.")
    model_args: tuple[str, ...] = Field((), description="Arguments that name the model, as {model}.")
    prewarm: Literal["agent", "server"] = Field(
        "server",
        description="What a generic warm sandbox holds. agent: the agent, which takes a home that is moved in later; "
        "server: the agent is started anew for a user who has a home.",
    )
    open_ahead: Literal["never", "own", "new", "any"] = Field(
        "own",
        description="Conversation opened before its client asks: in a user's own sandbox (own), in generic ones for "
        "users without a home (new), for everybody (any).",
    )
    live_mcp: bool = Field(False, description="Takes new MCP servers in an open conversation.")
    credential_path: Annotated[str, AfterValidator(_below_home)] = Field(
        "", description="The agent's own credential file below HOME, for credentials of mode file."
    )
    credential_env: dict[str, str] = Field(
        {},
        description="Laid over env for a user with a credential of mode file; an empty value takes a variable away.",
    )
    egress_hosts: tuple[HostRule, ...] = Field(
        (), max_length=256, description="Hosts that its sandboxes may reach: name (port 443), name:port or *.name."
    )
    egress_ecosystems: tuple[Ecosystem, ...] = Field(
        (), description="Ready-made lists of hosts: python, node, go, rust, java, ruby, debian, git."
    )
    max_restarts: int = Field(5, ge=0, description="Restarts in a row before the agent counts as failed.")

    @model_validator(mode="after")
    def _choice(self) -> AgentConfig:
        if self.model == "fastest" and not (self.models and self.provider):
            raise ValueError("model fastest needs models to choose from, and provider: where they are measured")
        return self

    @model_validator(mode="after")
    def _port(self) -> AgentConfig:
        has_port = any("{port}" in part for part in self.command)
        if (self.protocol == "websocket") != has_port:
            raise ValueError(
                "a websocket agent's command holds {port}, the loopback port it listens on; an acp agent's does not"
            )
        return self


class PoolAgentConfig(Section):
    minimum: int = Field(0, ge=0, le=1000, description="Generic warm sandboxes that are kept whatever is forecast.")
    target: int = Field(2, ge=0, le=1000, description="Generic warm sandboxes to have.")
    maximum: int = Field(16, ge=0, le=1000, description="More than these are never made ahead, whatever is forecast.")
    hot: int = Field(1, ge=0, le=1000, description="So many of them are not paused.")

    @model_validator(mode="after")
    def _ordered(self) -> PoolAgentConfig:
        if not self.minimum <= self.target <= self.maximum:
            raise ValueError("minimum, target and maximum have to be in that order")
        return self


class IdleConfig(Section):
    pause_after_s: Seconds = Field(60.0, description="A session that nobody uses is paused after so long.")
    keep_s: Seconds = Field(300.0, description="Kept so long after its last use when its user was busy.")
    busy_requests: int = Field(3, ge=0, description="Busy: more requests than these within busy_window_s.")
    busy_window_s: Seconds = Field(300.0, description="See busy_requests.")
    fallback_keep_s: Seconds = Field(
        120.0, description="Kept so long when the user was not busy and has no pattern yet."
    )
    longest_keep_s: Seconds = Field(3600.0, description="Never kept longer than this, whatever the pattern says.")
    attached_pause_after_s: Seconds = Field(
        900.0,
        description="A session with clients that say nothing is paused after so long; their next message wakes it.",
    )


class ForecastConfig(Section):
    mode: Literal["off", "forecast", "on"] = Field(
        "forecast", description="Who comes when. forecast: reported, nothing is done; on: sandboxes are prepared."
    )
    interval_s: Seconds = Field(60.0, description="Time between looks.")
    lead_s: Seconds = Field(120.0, description="A sandbox is prepared so long before its user is expected.")
    top_users: int = Field(20, ge=0, description="Most active users that are looked at.")
    history_days: int = Field(14, ge=1, le=90, description="Days of activity that are kept.")


class PoolConfig(Section):
    agents: dict[AgentName, PoolAgentConfig] = Field(
        {}, description="Warm sandboxes by agent; none where it is not named."
    )
    memory_bytes: int = Field(0, ge=0, description="For all warm sandboxes together. 0: half of the host's memory.")
    reserve_bytes: int = Field(2**30, ge=0, description="Memory of the host that warm sandboxes leave free.")
    refill_concurrency: int = Field(2, ge=1, le=64, description="Warm sandboxes made at once.")
    refill_per_s: float = Field(4.0, gt=0, le=1000, description="Warm sandboxes made a second, on average.")
    refill_burst: int = Field(10, ge=1, le=1000, description="Of them at once after a quiet time.")
    debounce_s: float = Field(
        1.0, ge=0, le=60, description="Pause between a claim and the refill for it, which the user's first turn has."
    )
    backoff_s: Seconds = Field(1.0, description="First pause after a warm sandbox could not be made; it doubles.")
    breaker_failures: int = Field(5, ge=1, description="Failures in a row after which none is made for breaker_s.")
    breaker_s: Seconds = Field(60.0, description="See breaker_failures.")
    cost_per_hour: float = Field(
        0.0, ge=0, description="Cost of one sandbox an hour, to show what idling costs. 0: not shown."
    )
    idle: IdleConfig = IdleConfig()
    forecast: ForecastConfig = ForecastConfig()


class VaultConfig(Section):
    key_file: str = Field(
        "",
        description="Master keys. Default: {credentials}/cortex-vault.key where systemd passes one, else "
        "{state_dir}/vault.key, made 0600 at first start.",
    )
    refresh_ahead_s: Seconds = Field(300.0, description="OAuth tokens are renewed so long before they expire.")
    refresh_timeout_s: Seconds = Field(15.0, description="Deadline of a renewal.")


class DefaultsConfig(Section):
    """Defaults of the eight user sections; checked with their schemas in ``broker.session.sections``."""

    settings: dict[str, object] = Field({}, description="Default section settings.")
    mcp: dict[str, object] = Field({}, description="Default section mcp.")
    plugins: dict[str, object] = Field({}, description="Default section plugins.")
    providers: dict[str, object] = Field({}, description="Default section providers.")
    env: dict[str, object] = Field({}, description="Default section env.")
    workspace: dict[str, object] = Field({}, description="Default section workspace.")
    egress: dict[str, object] = Field({}, description="Default section egress.")
    limits: dict[str, object] = Field({}, description="Default section limits.")


class Config(Section):
    """The whole tree. ``agents`` always holds ``demo``."""

    broker: BrokerConfig = BrokerConfig()
    front: FrontConfig = FrontConfig()
    control: ControlConfig = ControlConfig()
    session: SessionConfig = SessionConfig()
    sandbox: SandboxSettings = SandboxSettings()
    gateway: GatewayConfig = GatewayConfig()
    pool: PoolConfig = PoolConfig()
    vault: VaultConfig = VaultConfig()
    agents: dict[AgentName, AgentConfig] = Field({}, description="Agents by name.")
    defaults: DefaultsConfig = DefaultsConfig()

    @model_validator(mode="after")
    def _agents(self) -> Config:
        agents = {"demo": DEMO_AGENT, **self.agents}
        object.__setattr__(self, "agents", agents)
        if self.session.default_agent not in agents:
            raise ValueError(f"session.default_agent {self.session.default_agent!r} is not in [agents]")
        for name, agent in agents.items():
            if agent.provider and agent.provider not in self.gateway.providers:
                raise ValueError(f"agents.{name}.provider {agent.provider!r} is not in [gateway.providers]")
        for name in self.pool.agents:
            if name not in agents:
                raise ValueError(f"pool.agents.{name}: there is no such agent in [agents]")
        return self


DEMO_AGENT = AgentConfig(command=("{python}", "-I", "-S", "{sandbox_agent}/demo.py"), prewarm="agent", open_ahead="any")

USER_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+:|-]{0,127}")
"""A user id or workspace name."""
