"""Which hosts and addresses a sandbox may reach. Pure.

A name is allowed by list; then every address that it has is judged, because a name that anyone may
register can lead to the machine's own network (SSRF, DNS rebinding). Sources: the IANA special-purpose
registries (RFC 6890), RFC 6052 (NAT64), RFC 4291 (mapped addresses), RFC 6598 (shared space).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Literal

Verdict = Literal["public", "private", "never"]
"""``private``: only for hosts that config lists as such; ``never``: for nobody."""

_NAME = re.compile(r"(?=.{1,253}$)[a-z0-9_]([a-z0-9_-]{0,62})(\.[a-z0-9_]([a-z0-9_-]{0,62}))*")

_NEVER_4 = tuple(map(IPv4Network, ("0.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4", "240.0.0.0/4", "192.0.0.192/32")))
_PRIVATE_4 = tuple(
    map(
        IPv4Network,
        (
            "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24",
            "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24", "192.168.0.0/16", "192.175.48.0/24",
            "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
        ),
    )
)  # fmt: skip
_METADATA_4 = frozenset(map(IPv4Address, ("100.100.100.200", "168.63.129.16")))
_GLOBAL_6 = IPv6Network("2000::/3")
_NEVER_6 = tuple(map(IPv6Network, ("::/128", "fe80::/10", "ff00::/8", "fd00:ec2::254/128", "fd20:ce::254/128")))
_PRIVATE_6 = tuple(map(IPv6Network, ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20", "2620:4f:8000::/48")))
_NAT64 = IPv6Network("64:ff9b::/96")
_MAPPED = IPv6Network("::ffff:0:0/96")
_6TO4 = IPv6Network("2002::/16")


def judge(address: str) -> Verdict:
    """What may be done with an IP address as text (a zone id is ignored)."""
    ip = ip_address(address.partition("%")[0])
    return _judge_4(ip) if isinstance(ip, IPv4Address) else _judge_6(ip)


def _judge_4(ip: IPv4Address) -> Verdict:
    if ip in _METADATA_4 or any(ip in network for network in _NEVER_4):
        return "never"
    return "private" if any(ip in network for network in _PRIVATE_4) else "public"


def _judge_6(ip: IPv6Address) -> Verdict:
    if ip in _MAPPED:
        return _judge_4(IPv4Address(int(ip) & 0xFFFFFFFF))
    if any(ip in network for network in _NEVER_6):
        return "never"
    embedded = None
    if ip in _NAT64:
        embedded = IPv4Address(int(ip) & 0xFFFFFFFF)
    elif ip in _6TO4:
        embedded = IPv4Address((int(ip) >> 80) & 0xFFFFFFFF)
    if embedded is not None and _judge_4(embedded) == "never":
        return "never"
    if ip not in _GLOBAL_6 or any(ip in network for network in _PRIVATE_6):
        return "private"
    return "public"


def permitted(addresses: Iterable[str], *, private: bool) -> list[str]:
    """Those of ``addresses`` that may be connected to, in order."""
    accepted = ("public", "private") if private else ("public",)
    return [address for address in addresses if judge(address) in accepted]


def parse_authority(text: str, default_port: int | None = None) -> tuple[str, int] | None:
    """``host:port`` or ``[v6]:port`` as (lower-case host without brackets or last dot, port); None if malformed."""
    host, port_text = text, ""
    if text.startswith("["):
        host, closed, rest = text[1:].partition("]")
        if not closed or (rest and not rest.startswith(":")) or ":" not in host:
            return None
        port_text = rest[1:]
        if rest == ":":
            return None
    elif ":" in text:
        host, _, port_text = text.partition(":")
        if not port_text:
            return None
    if not port_text:
        port = default_port
    else:
        port = int(port_text) if re.fullmatch(r"[0-9]{1,5}", port_text) else None
    if port is None or not 0 < port < 65536:
        return None
    host = host.lower().removesuffix(".")
    return (host, port) if _is_host(host) else None


def _is_host(host: str) -> bool:
    if ":" not in host:
        return _NAME.fullmatch(host) is not None
    try:
        IPv6Address(host)
    except ValueError:
        return False
    return "%" not in host


def listed(host: str, port: int, rules: Iterable[str], *, default_port: int | None = 443) -> bool:
    """Whether a rule names ``host`` and ``port``: ``name`` (then ``default_port``; None: any port),
    ``name:port``, ``*.name`` (its subdomains, not itself). A malformed rule names nothing."""
    return any(_matches(host, port, rule.strip(), default_port) for rule in rules)


def _matches(host: str, port: int, rule: str, default_port: int | None) -> bool:
    wild = rule.startswith("*.")
    parsed = parse_authority(rule[2:] if wild else rule, port if default_port is None else default_port)
    if parsed is None or parsed[1] != port:
        return False
    return host.endswith("." + parsed[0]) if wild else host == parsed[0]
