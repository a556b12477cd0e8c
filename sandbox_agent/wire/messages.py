"""The messages between broker and agent server, and the preambles that open a connection.

Every message is a frozen dataclass with a ``TYPE``; ``encode`` makes the map for ``codec.pack``,
``decode`` checks types and lengths of what came in and raises ``WireError``. Unknown keys are
ignored, so that a newer peer can say more.

The agent server dials the slot's ``agent`` socket. A connection opens with ``Preamble``. On a
``control`` connection ``Hello`` follows at once, the broker answers ``Welcome``. On a ``stream``
connection nothing follows until the broker writes ``Attach``; from then on both sides send raw
WebSocket frames (RFC 6455; from the client masked, to the client not). On a ``journal``
connection the broker answers ``Grant`` with exactly one file descriptor (SCM_RIGHTS) and closes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from types import NoneType, UnionType
from typing import Any, ClassVar, Self, Union, get_args, get_origin, get_type_hints

from sandbox_agent.wire.codec import WireError

MAX_TEXT = 65_536
"""Longest string in a message from a sandbox, unless its field says more."""
MAX_CREDENTIAL_FILE = 128 * 2**10
"""Largest credential file, both ways, in bytes."""


def _matches(value: Any, kind: Any) -> bool:
    origin = get_origin(kind)
    if kind is Any:
        return True
    if origin in (Union, UnionType):
        return any(_matches(value, option) for option in get_args(kind))
    if origin is dict:
        key, item = get_args(kind)
        return isinstance(value, dict) and all(_matches(k, key) and _matches(v, item) for k, v in value.items())
    if origin is list:
        return isinstance(value, list) and all(_matches(item, get_args(kind)[0]) for item in value)
    if kind is NoneType:
        return value is None
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


@dataclass(frozen=True)
class Message:
    """Base: dataclass fields are the map's keys."""

    TYPE: ClassVar[str] = ""

    def encode(self) -> dict[str, Any]:
        """The map for the wire, ``t`` being the type."""
        return {"t": self.TYPE} | {item.name: _plain(getattr(self, item.name)) for item in fields(self)}

    @classmethod
    def decode(cls, data: dict[str, Any]) -> Self:
        """Checks ``data``. Raises ``WireError``."""
        hints = _hints(cls)
        values: dict[str, Any] = {}
        for item in fields(cls):
            if item.name not in data:
                continue
            kind, value = hints[item.name], data[item.name]
            if isinstance(kind, type) and issubclass(kind, Message):
                if not isinstance(value, dict):
                    raise WireError(f"{cls.TYPE}.{item.name} is not a map")
                value = kind.decode(value)
            elif not _matches(value, kind):
                raise WireError(f"{cls.TYPE}.{item.name} has the wrong type")
            values[item.name] = value
        try:
            return cls(**values)
        except TypeError as error:
            raise WireError(f"{cls.TYPE}: {error}") from error


def _plain(value: Any) -> Any:
    return value.encode() if isinstance(value, Message) else value


_HINTS: dict[type, dict[str, Any]] = {}


def _hints(cls: type[Message]) -> dict[str, Any]:
    if cls not in _HINTS:
        _HINTS[cls] = get_type_hints(cls)
    return _HINTS[cls]


@dataclass(frozen=True)
class Preamble(Message):
    """First on every connection. ``kind``: control, stream or journal; ``secret``: from Welcome.

    ``segment`` (journal only): the file wanted; -1 is the newest, one more than the newest makes
    the next.
    """

    TYPE: ClassVar[str] = "preamble"
    kind: str
    version: int
    secret: bytes = field(default=b"", repr=False)
    segment: int = -1


@dataclass(frozen=True)
class Hello(Message):
    """What the sandbox has. ``applied``: hash by part (empty after a start). ``agent``: its state."""

    TYPE: ClassVar[str] = "hello"
    pid: int
    applied: dict[str, str] = field(default_factory=dict)
    agent: str = "stopped"
    agent_info: str = ""
    """The agent's ``initialize`` result as JSON text, empty until it is held."""
    open_turns: int = 0


@dataclass(frozen=True)
class AgentSpec(Message):
    """How the agent is started. Placeholders {python}, {sandbox_agent}, {home}, {gateway}, {egress}, {port}."""

    TYPE: ClassVar[str] = "agent"
    name: str
    protocol: str
    command: list[str]
    env: dict[str, str] = field(default_factory=dict, repr=False)
    files: dict[str, str] = field(default_factory=dict)
    cwd: str = "/"
    init_timeout_s: float = 60.0
    max_restarts: int = 5
    live_mcp: bool = False


@dataclass(frozen=True)
class Welcome(Message):
    """Answer to Hello. ``agent_spec`` given: start it now (its hash is ``agent_hash``).

    ``session`` empty: a warm sandbox that is nobody's yet; there is no journal until a ``claim`` is bound.
    """

    TYPE: ClassVar[str] = "welcome"
    incarnation: int
    secret: bytes = field(repr=False)
    session: str = ""
    agent_spec: AgentSpec | None = None
    agent_hash: str = ""
    home: str = "/vol/home"
    credentials_dir: str = ""
    """Private tmpfs for credential files; empty: there is none, and no such file is taken."""
    gateway_port: int = 0
    """Loopback port for the gateway inside the sandbox; 0: any free one."""
    egress_port: int = 0
    streams: int = 2
    max_message_bytes: int = 32 * 2**20
    client_buffer_bytes: int = 8 * 2**20
    stall_timeout_s: float = 30.0
    prompt_queue: int = 8
    journal_segment_bytes: int = 16 * 2**20

    @classmethod
    def decode(cls, data: dict[str, Any]) -> Self:
        spec = data.get("agent_spec")
        if isinstance(spec, dict):
            data = data | {"agent_spec": AgentSpec.decode(spec)}
        return super().decode(data)


@dataclass(frozen=True)
class Bind(Message):
    """Parts that differ, by name, and their hashes. Parts: ``process`` (an encoded AgentSpec),
    ``mcp`` (list of ACP McpServer objects), ``files`` (list of {path, mode, content: bytes}, credential
    files under HOME, kept on tmpfs), ``settings`` ({allow_client_mcp: bool, workspace: str, open_ahead: bool}).

    ``claim``, once for a sandbox that was welcomed without a session, applied first: {session: str, moved: bool
    (a home was moved in), restart: bool (the agent does not bear that), keep_ahead: bool (a conversation that was
    opened before may serve this user)}. From then on the journal is there."""

    TYPE: ClassVar[str] = "bind"
    id: int
    generation: int
    parts: dict[str, Any] = field(repr=False)
    hashes: dict[str, str]


@dataclass(frozen=True)
class Bound(Message):
    """A bind is applied. ``effect`` by part: now, next_turn (restarts when idle) or next_session."""

    TYPE: ClassVar[str] = "bound"
    id: int
    ok: bool
    applied: dict[str, str] = field(default_factory=dict)
    effect: dict[str, str] = field(default_factory=dict)
    code: str = ""
    what: str = ""
    hint: str = ""


@dataclass(frozen=True)
class Status(Message):
    """Sent on every change, and as the answer to Probe (then ``id`` is the probe's).

    ``agent``: stopped, starting, ready, restarting or failed; ``code``, ``what``, ``hint`` say why.
    """

    TYPE: ClassVar[str] = "status"
    agent: str
    id: int = 0
    agent_info: str = ""
    agent_pid: int = 0
    code: str = ""
    what: str = ""
    hint: str = ""
    open_turns: int = 0
    clients: int = 0
    turns: int = 0
    """Prompts accepted since the agent server started."""
    ahead: str = ""
    """The conversation that is opened ahead: empty (none), opening, open, or failed."""
    pending: int = 0
    """Beside turns: requests that the agent has not answered, clients with messages that wait, in or out, MCP servers
    that start. Told in answers to Probe only."""
    pss_bytes: int = 0
    started_ms: float = 0.0
    """From Welcome to the agent process running, milliseconds; 0 until known."""


@dataclass(frozen=True)
class Probe(Message):
    """Are you there? Answered by Status with the same id."""

    TYPE: ClassVar[str] = "probe"
    id: int


@dataclass(frozen=True)
class Stop(Message):
    """End the agent process, sync the journal, exit within ``grace_s``."""

    TYPE: ClassVar[str] = "stop"
    grace_s: float = 5.0


@dataclass(frozen=True)
class Build(Message):
    """To a builder sandbox (no tenant): install ``package`` into /vol/home/build. ``ecosystem``: npm or pypi."""

    TYPE: ClassVar[str] = "build"
    id: int
    ecosystem: str
    package: str
    scripts: bool = False
    registry: str = ""
    timeout_s: float = 180.0


@dataclass(frozen=True)
class Built(Message):
    """A build ended. ``bins``: command name → path below the build directory; ``integrity``: of the lock."""

    TYPE: ClassVar[str] = "built"
    id: int
    ok: bool
    integrity: str = ""
    bins: dict[str, str] = field(default_factory=dict)
    version: str = ""
    what: str = ""


@dataclass(frozen=True)
class Refreshed(Message):
    """The agent has changed one of its credential files (part ``files``); ``path`` is as it was bound.

    ``after``: SHA-256, in hex, of what it may have been made of: the content that was bound, and each that was
    sent since. Where the broker has another by now, the change comes too late.
    """

    TYPE: ClassVar[str] = "refreshed"
    path: str
    content: bytes = field(repr=False)
    after: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Attach(Message):
    """Opens a stream for one client. ``protocol``: acp or raw; ``client``: stable key of the client;
    ``cortex``: it offered the subprotocol cortex.acp.v1."""

    TYPE: ClassVar[str] = "attach"
    connection: str
    protocol: str
    client: str = ""
    cortex: bool = False


@dataclass(frozen=True)
class Grant(Message):
    """Comes with one journal file. ``first``..``last``: the segments that exist."""

    TYPE: ClassVar[str] = "grant"
    segment: int
    first: int
    last: int


FROM_SANDBOX: dict[str, type[Message]] = {m.TYPE: m for m in (Hello, Bound, Status, Built, Refreshed)}
FROM_BROKER: dict[str, type[Message]] = {m.TYPE: m for m in (Welcome, Bind, Probe, Stop, Build)}


def parse(data: dict[str, Any], kinds: dict[str, type[Message]]) -> Message:
    """The message in ``data``, one of ``kinds``. Raises ``WireError``."""
    kind = kinds.get(str(data.get("t")))
    if kind is None:
        raise WireError(f"unknown message {str(data.get('t'))[:40]!r}")
    return kind.decode(data)
