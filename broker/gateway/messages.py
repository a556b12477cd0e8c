"""What the broker and the gateway process say to each other: one JSON object a packet, plus descriptors.

The link is a SEQPACKET Unix socket, so a packet is a message. Broker to gateway: ``settings``, ``policy`` (one a
provider) and then ``policies`` (they are taken up), ``put`` (with two listening descriptors when they are new),
``drop``, ``whole``, ``usage_seen``, ``spent`` and ``ping``, each with an ``id`` that is answered. Gateway to broker:
``hello``, ``ack`` and ``report``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from broker.gateway.policy import Kind

if TYPE_CHECKING:
    # The gateway process does without what reads config.toml: 15 MB and 0.1 s.
    from broker.config import GatewayConfig

VERSION = 3
MAX_PACKET = 256 * 2**10
"""Largest packet in bytes; below what a Unix socket's send buffer takes at once."""

Scheme = Literal["key", "bearer", "passthrough"]
"""How a call is authenticated: the credential in the header of the provider's kind, as a bearer token (OAuth), or
by what the sandbox itself sends, which is stripped otherwise."""


class MessageError(ValueError):
    """The peer sent something that is no message, or a message would be too large."""


@dataclass(frozen=True)
class Provider:
    """A model provider as one slot may use it, at the path ``/NAME/…`` of its gateway socket.

    ``credential`` is put into each call as ``scheme`` says ("" puts none in), ``headers`` besides; ``ca``
    is a PEM bundle ("": the system's); ``private`` allows ``base_url`` to lead to a private address, so
    it is False for a ``base_url`` that an operator did not choose. ``policy`` names the operator's provider
    by whose ``Policy`` calls are treated; its servers are asked then, not ``base_url``.
    """

    kind: Kind
    base_url: str
    credential: str = field(default="", repr=False)
    ca: str = field(default="", repr=False)
    private: bool = True
    scheme: Scheme = "key"
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    policy: str = ""


@dataclass(frozen=True)
class Egress:
    """Where a slot may CONNECT to. ``hosts``: ``name`` (port 443) or ``name:port``; a name that begins
    with ``*.`` stands for its subdomains. ``private``: names that may have private addresses."""

    hosts: tuple[str, ...] = ()
    private: tuple[str, ...] = ()


@dataclass(frozen=True)
class SlotEntry:
    """What the gateway knows of one slot. ``identity`` (user, workspace, session, …) is None while
    nobody has claimed it: every request is then answered 503."""

    slot: str
    incarnation: int
    identity: Mapping[str, str] | None = None
    providers: Mapping[str, Provider] = field(default_factory=dict)
    egress: Egress = Egress()


@dataclass(frozen=True, slots=True)
class Settings:
    """The part of ``[gateway]`` that the gateway process acts on; same names and units."""

    connect_timeout_s: float = 10.0
    idle_timeout_s: float = 600.0
    dns_timeout_s: float = 5.0
    max_head_bytes: int = 64 * 2**10
    max_connections_per_sandbox: int = 256
    max_tunnels_per_sandbox: int = 128
    egress_bytes_per_hour: int = 0

    @classmethod
    def of(cls, config: GatewayConfig) -> Settings:
        """The part of a ``[gateway]`` section."""
        return cls(**{each.name: getattr(config, each.name) for each in fields(cls)})

    @classmethod
    def from_wire(cls, values: dict[str, Any]) -> Settings:
        """From the broker's message. Raises ``MessageError``."""
        try:
            return cls(**{each.name: _number(each.name, values[each.name]) for each in fields(cls)})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise MessageError(f"not settings: {error}") from error


_MAY_BE_ZERO = frozenset(("max_tunnels_per_sandbox", "egress_bytes_per_hour"))


def _number(name: str, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise ValueError("not a number")
    if value == 0 and name not in _MAY_BE_ZERO:
        raise ValueError("not a positive number")
    return value


def entry_to_wire(entry: SlotEntry) -> dict[str, Any]:
    """The fields of a ``put``."""
    return {
        "slot": entry.slot,
        "incarnation": entry.incarnation,
        "identity": None if entry.identity is None else dict(entry.identity),
        "providers": {name: asdict(provider) for name, provider in entry.providers.items()},
        "egress": {"hosts": list(entry.egress.hosts), "private": list(entry.egress.private)},
    }


def entry_from_wire(message: Mapping[str, Any]) -> SlotEntry:
    """The entry in a ``put``. Raises ``MessageError``."""
    try:
        return SlotEntry(
            slot=str(message["slot"]),
            incarnation=int(message["incarnation"]),
            identity=message["identity"],
            providers={name: Provider(**provider) for name, provider in message["providers"].items()},
            egress=Egress(tuple(message["egress"]["hosts"]), tuple(message["egress"]["private"])),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MessageError(f"not a slot: {error}") from error


def pack(message: Mapping[str, Any]) -> bytes:
    """One packet. Raises ``MessageError`` over ``MAX_PACKET``."""
    packet = msgspec.json.encode(message)
    if len(packet) > MAX_PACKET:
        raise MessageError(f"a packet of {len(packet)} bytes is over the limit of {MAX_PACKET}")
    return packet


def unpack(packet: bytes) -> dict[str, Any]:
    """The object in a packet. Raises ``MessageError``."""
    try:
        message = msgspec.json.decode(packet)
    except (ValueError, RecursionError) as error:
        raise MessageError("not JSON") from error
    if not isinstance(message, dict) or not isinstance(message.get("type"), str):
        raise MessageError("not a message")
    return message
