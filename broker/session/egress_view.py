"""What users' sandboxes wanted of the world outside: told by the gateway, kept for people to see. No I/O."""

from __future__ import annotations

import json
import shlex
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from broker.gateway.addresses import listed
from broker.metrics import EGRESS_BYTES, EGRESS_DECISIONS
from broker.session.ecosystems import TOOLS, ecosystem_of

Result = Literal["allowed", "denied", "refused_address", "limited"]
RESULTS: tuple[Result, ...] = get_args(Result)
MAX_HOSTS = 200
"""Kept of one user, those used last."""
MAX_USERS = 2000
MAX_WARNINGS = 5
Place = tuple[str, str, int]


@dataclass(slots=True)
class Seen:
    """One host, as one workspace of a user used it since the broker started. ``last_at``: Unix seconds."""

    workspace: str
    host: str
    port: int
    tool: str = ""
    last: Result = "allowed"
    allowed: int = 0
    denied: int = 0
    refused_address: int = 0
    limited: int = 0
    sent: int = 0
    received: int = 0
    last_at: float = 0.0

    def view(self) -> dict[str, Any]:
        """JSON-safe."""
        return {each.name: getattr(self, each.name) for each in fields(self)}


class EgressView:
    """``clock`` gives Unix seconds."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._users: OrderedDict[str, OrderedDict[Place, Seen]] = OrderedDict()

    def heard(self, report: Mapping[str, Any]) -> None:
        """A report of kind ``egress``; see ``broker.gateway.egress``."""
        user, workspace = str(report["user"]), str(report["workspace"])
        for row in report["hosts"]:
            for result in RESULTS:
                EGRESS_DECISIONS.labels(result).inc(row[result])
            EGRESS_BYTES.labels("sent").inc(row["sent"])
            EGRESS_BYTES.labels("received").inc(row["received"])
            # Package builders are nobody's; the host "" stands for many.
            if user and row["host"]:
                self._add(user, workspace, row)

    def of_user(self, user: str) -> list[Seen]:
        """Hosts of a user, the last used first."""
        return list(reversed(self._users.get(user, {}).values()))

    def warnings(self, user: str, workspace: str, rules: Iterable[str], section: Mapping[str, Any]) -> tuple[str, ...]:
        """For people: what was denied in a workspace last and is not allowed by ``rules`` now; ``section``: see
        ``allow_line``."""
        rules = tuple(rules)
        found = [
            seen
            for seen in self.of_user(user)
            if seen.workspace == workspace and seen.last == "denied" and not listed(seen.host, seen.port, rules)
        ]
        return tuple(denial(user, seen, section) for seen in found[:MAX_WARNINGS])

    def forget(self, user: str) -> None:
        """The user is erased."""
        self._users.pop(user, None)

    def _add(self, user: str, workspace: str, row: Mapping[str, Any]) -> None:
        hosts = self._users.setdefault(user, OrderedDict())
        self._users.move_to_end(user)
        place = (workspace, str(row["host"]), int(row["port"]))
        seen = hosts.setdefault(place, Seen(*place))
        hosts.move_to_end(place)
        for name in (*RESULTS, "sent", "received"):
            setattr(seen, name, getattr(seen, name) + int(row[name]))
        seen.tool = str(row["tool"]) or seen.tool
        seen.last = row["last"] or seen.last
        seen.last_at = self._clock()
        if len(hosts) > MAX_HOSTS:
            hosts.popitem(last=False)
        if len(self._users) > MAX_USERS:
            self._users.popitem(last=False)


def denial(user: str, seen: Seen, section: Mapping[str, Any]) -> str:
    """What is said of a host that no list allows."""
    ecosystem = ecosystem_of(seen.host, seen.port)
    guess = f"{TOOLS[ecosystem]} or the like" if ecosystem else "something"
    where = f"{seen.tool or guess} wanted {place(seen.host, seen.port)}: denied"
    line = allow_line(user, section, seen.host, seen.port)
    return f"{where}; allow it with: {line}" if line else f"{where}; addresses of IPv6 cannot be allowed"


def allow_line(user: str, section: Mapping[str, Any], host: str, port: int) -> str:
    """The shell command that adds a host, or the ecosystem that has it, to the user's ``section`` egress; "" where
    there is none."""
    if ":" in host:
        return ""
    ecosystem = ecosystem_of(host, port)
    key, new = ("ecosystems", ecosystem) if ecosystem else ("hosts", place(host, port))
    value = {**section, key: [*dict.fromkeys((*section.get(key, ()), new))]}
    return f"echo {shlex.quote(json.dumps(value))} | cortex user config set {shlex.quote(user)} egress"


def place(host: str, port: int) -> str:
    """As a rule names it."""
    name = f"[{host}]" if ":" in host else host
    return name if port == 443 else f"{name}:{port}"
