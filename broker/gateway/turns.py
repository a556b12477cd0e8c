"""Whose call is next: users take turns, each user's calls go in the order they came. Pure.

What is in the way of one call is in the way of others too, as far as its ``Reach`` says. Calls of a user
whose sandbox or own credential is at its limit let that user's other ones by; nothing else is overtaken, so
a large call is not starved by small ones.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from enum import Enum
from typing import Generic, NamedTuple, Protocol, TypeVar

from broker.gateway.limits import Gauge


class Reach(Enum):
    """Who else is held by what holds a call."""

    LINE = "line"
    """Calls of the same sandbox with the same credential."""
    USER = "user"
    POOL = "pool"
    """Calls that use the operator's keys."""
    ALL = "all"


class Block(NamedTuple):
    """In the way until ``at``, or (infinite) until a call ends. ``scope``: field of ``Limits``; ``gauge``: the limit,
    None: the provider has asked for a pause; ``lasting``: only time or the end of a call of that user helps."""

    at: float
    reach: Reach
    scope: str
    gauge: Gauge | None
    lasting: bool = False


class Waiter(Protocol):
    @property
    def user(self) -> str: ...
    @property
    def line(self) -> tuple[str, str]:
        """Sandbox and own credential."""

    @property
    def number(self) -> int:
        """Grows with each."""

    @property
    def pooled(self) -> bool:
        """Uses the operator's keys."""


W = TypeVar("W", bound=Waiter)


class Queue(Generic[W]):
    """The waiting calls of one user. ``at``: none can go before."""

    __slots__ = ("at", "count", "lines")

    def __init__(self) -> None:
        self.at = -math.inf
        self.count = 0
        self.lines: dict[tuple[str, str], OrderedDict[W, None]] = {}

    def heads(self) -> list[W]:
        """The first of each line, in the order they came."""
        heads = [next(iter(line)) for line in self.lines.values()]
        if len(heads) > 1:
            heads.sort(key=lambda each: each.number)
        return heads

    def newest(self) -> W:
        """The last to come."""
        return max((next(reversed(line)) for line in self.lines.values()), key=lambda each: each.number)


class Turns(Generic[W]):
    """All waiting calls."""

    def __init__(self) -> None:
        self._queues: OrderedDict[str, Queue[W]] = OrderedDict()
        self.count = 0

    def add(self, waiter: W) -> int:
        """Goes to the end of its line; how many are ahead in it."""
        queue = self._queues.setdefault(waiter.user, Queue())
        line = queue.lines.setdefault(waiter.line, OrderedDict())
        line[waiter] = None
        queue.count += 1
        queue.at = -math.inf
        self.count += 1
        return len(line) - 1

    def remove(self, waiter: W) -> None:
        """It goes, or waits no more."""
        queue = self._queues[waiter.user]
        line = queue.lines[waiter.line]
        del line[waiter]
        if not line:
            del queue.lines[waiter.line]
        queue.count -= 1
        queue.at = -math.inf
        self.count -= 1
        if not queue.count:
            del self._queues[waiter.user]

    def ended(self, user: str) -> None:
        """A call of the user has ended, so what was in the way may be gone."""
        queue = self._queues.get(user)
        if queue is not None:
            queue.at = -math.inf

    def serve(self, now: float, start: Callable[[W], Block | None]) -> float:
        """Starts the next call that can go: ``start`` says what is in the way, or None: it has started. Gives -inf when
        one has, else when to try again; infinite: when a call ends."""
        again = math.inf
        pool_shut = False
        for user, queue in self._queues.items():
            if queue.at > now:
                again = min(again, queue.at)
                continue
            own = math.inf
            lasting = True
            for waiter in queue.heads():
                if pool_shut and waiter.pooled:
                    lasting = False
                    continue
                block = start(waiter)
                if block is None:
                    self._queues.move_to_end(user)
                    self.remove(waiter)
                    return -math.inf
                own = min(own, block.at)
                lasting = lasting and block.lasting
                if block.reach is Reach.ALL:
                    return min(again, own)
                if block.reach is Reach.USER:
                    break
                pool_shut = pool_shut or block.reach is Reach.POOL
            again = min(again, own)
            if lasting:
                queue.at = own
        return again

    def look_again(self) -> None:
        """Nothing is known of what is in the way."""
        for queue in self._queues.values():
            queue.at = -math.inf

    def crowd(self) -> Queue[W]:
        """The user with the most waiting calls."""
        return max(self._queues.values(), key=lambda queue: queue.count)

    def waiting_of(self, user: str) -> int:
        queue = self._queues.get(user)
        return queue.count if queue is not None else 0

    @property
    def users(self) -> int:
        """How many wait."""
        return len(self._queues)
