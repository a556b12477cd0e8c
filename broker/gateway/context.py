"""What all connections of the gateway process share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from broker.gateway.dialer import Dialer
from broker.gateway.messages import Settings
from broker.gateway.resolve import Resolver
from broker.gateway.stats import Stats
from broker.gateway.upstream import Pool
from broker.host.tasks import TaskOwner


@dataclass
class Context:
    """``report`` tells the broker something by itself: what came out of which slot. ``emptied`` is set
    whenever the last connection of a sandbox has gone."""

    tasks: TaskOwner
    settings: Settings = field(default_factory=Settings)
    stats: Stats = field(default_factory=Stats)
    report: Callable[[dict[str, Any]], None] = lambda _: None
    draining: bool = False

    def __post_init__(self) -> None:
        self.emptied = asyncio.Event()
        self.resolver = Resolver(self.tasks, lambda: self.settings.dns_timeout_s)
        self.dialer = Dialer(self.resolver, lambda: self.settings.connect_timeout_s)
        self.pool = Pool(self.dialer, self.stats, lambda: self.settings.max_head_bytes)

    def close(self) -> None:
        self.pool.close()
        self.resolver.close()
