"""How much may be asked of a provider, and when: limits of one thing each, and credentials that rest. Pure.

Times are seconds of one monotonic clock. Should it step back all the same, nothing waits longer for it
than the limit's own span.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection

from broker.gateway.policy import Limit

MINUTE_S = 60.0
GRAIN_S = 0.5
EXACT = 120
"""Windows up to this capacity remember each use; larger ones put uses within ``GRAIN_S`` together."""
FIRST_REST_S = 1.0
MAX_REST_S = 60.0
"""Longest rest that nobody asked for; it doubles up to here."""
MAX_OVERLOAD_S = 4.0
"""The same for a whole provider: under load it refuses some calls, and still answers most."""
MAX_ASKED_REST_S = 86_400.0
LATER = math.inf
"""When a call ends, whenever that is."""
NEVER = -math.inf


class Cell:
    """Part of a window: ``amount`` used from ``first`` to ``last``."""

    __slots__ = ("amount", "first", "last")

    def __init__(self, now: float, amount: int) -> None:
        self.first = self.last = now
        self.amount = amount


class Window:
    """At most ``capacity`` in any 60 s, which a token bucket of that size does not promise: full, then refilled,
    it lets twice as much through. Uses put together count until the last of them is a minute old, so the sum is
    never too low and memory is bounded: ``EXACT`` cells and a few."""

    __slots__ = ("_cells", "_grain", "capacity", "used")

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0
        self._grain = 0.0 if capacity <= EXACT else GRAIN_S
        self._cells: deque[Cell] = deque()

    def add(self, now: float, amount: int) -> Cell:
        """Used now, whether it fits or not."""
        self.expire(now)
        cells = self._cells
        self.used += amount
        if cells and now - cells[-1].first < self._grain:
            cell = cells[-1]
            cell.last = now
            cell.amount += amount
        else:
            cell = Cell(now, amount)
            cells.append(cell)
        return cell

    def free_at(self, now: float, amount: int) -> float:
        """When ``amount`` fits; more than the capacity fits when nothing else is used."""
        over = self.used + min(amount, self.capacity) - self.capacity
        if over <= 0:
            return now
        self.expire(now)
        over = self.used + min(amount, self.capacity) - self.capacity
        if over <= 0:
            return now
        for cell in self._cells:
            over -= cell.amount
            if over <= 0:
                return cell.last + MINUTE_S
        return now

    def settle(self, now: float, cell: Cell, reserved: int, used: int) -> None:
        """What was ``reserved`` in ``cell`` becomes ``used``: less is given back, more counts from now on."""
        self.expire(now)
        if used > reserved:
            self.add(now, used - reserved)
        elif cell.last != NEVER:
            cell.amount -= reserved - used
            self.used -= reserved - used

    def expire(self, now: float) -> None:
        """Forgets what is over a minute old."""
        cells = self._cells
        if cells and cells[-1].last > now:
            for cell in cells:
                cell.first, cell.last = min(cell.first, now), min(cell.last, now)
        while cells and cells[0].last + MINUTE_S <= now:
            cell = cells.popleft()
            self.used -= cell.amount
            cell.last = NEVER

    def idle(self, now: float) -> bool:
        """Nothing was used within a minute."""
        self.expire(now)
        return not self._cells

    def __len__(self) -> int:
        return len(self._cells)


class Gauge:
    """The calls of one provider, credential, user or sandbox against its limit."""

    __slots__ = ("_calls", "_concurrency", "_interval_s", "_next_at", "_tokens", "limit", "running")

    def __init__(self, limit: Limit) -> None:
        self.limit = limit
        self.running = 0
        self._concurrency = limit.concurrency
        self._interval_s = limit.interval_s
        self._next_at = NEVER
        self._calls = Window(limit.rpm) if limit.rpm else None
        self._tokens = Window(limit.tpm) if limit.tpm else None

    def ready_at(self, now: float, tokens: int) -> float:
        """When a call may start: not after ``now``: at once; ``LATER``: when another ends."""
        if self._concurrency and self.running >= self._concurrency:
            return LATER
        at = self._paced_at(now) if self._interval_s else now
        if self._calls is not None:
            at = max(at, self._calls.free_at(now, 1))
        if self._tokens is not None and tokens:
            at = max(at, self._tokens.free_at(now, tokens))
        return at

    def not_before(self, now: float, tokens: int, ahead: int) -> float:
        """A time before which a call surely does not start that ``ahead`` others go before."""
        at = self._paced_at(now) + ahead * self._interval_s if self._interval_s else now
        if self._calls is not None:
            rounds, rest = divmod(ahead, self._calls.capacity)
            at = max(at, self._calls.free_at(now, rest + 1) + rounds * MINUTE_S)
        if self._tokens is not None and tokens and not self.running:  # else some may be given back
            at = max(at, self._tokens.free_at(now, tokens))
        return at

    def in_the_way(self, now: float, tokens: int) -> str:
        """The limit's field that a call waits for longest; "" when for none."""
        if self._concurrency and self.running >= self._concurrency:
            return "concurrency"
        waits = {
            "interval_s": self._paced_at(now) if self._interval_s else now,
            "rpm": self._calls.free_at(now, 1) if self._calls is not None else now,
            "tpm": self._tokens.free_at(now, tokens) if self._tokens is not None and tokens else now,
        }
        name = max(waits, key=lambda each: waits[each])
        return name if waits[name] > now else ""

    def begin(self, now: float, tokens: int) -> Cell | None:
        """A call starts; what ``end`` wants back."""
        self.running += 1
        if self._interval_s:
            self._next_at = max(now, self._next_at) + self._interval_s
        if self._calls is not None:
            self._calls.add(now, 1)
        return self._tokens.add(now, tokens) if self._tokens is not None else None

    def end(self, now: float, cell: Cell | None, reserved: int, used: int | None) -> None:
        """``used``: tokens as reported; None: unknown, so what was reserved stands."""
        self.running -= 1
        if cell is not None and self._tokens is not None and used is not None:
            self._tokens.settle(now, cell, reserved, used)

    def idle(self, now: float) -> bool:
        """A new one would do the same."""
        return (
            not self.running
            and (not self._interval_s or self._paced_at(now) <= now)
            and (self._calls is None or self._calls.idle(now))
            and (self._tokens is None or self._tokens.idle(now))
        )

    @property
    def used_tokens(self) -> int:
        """Of the last minute, where they are limited."""
        return self._tokens.used if self._tokens is not None else 0

    def _paced_at(self, now: float) -> float:
        if self._next_at - now > self._interval_s:
            self._next_at = now + self._interval_s
        return self._next_at


class Rest:
    """A time in which nothing is asked, because the provider said so."""

    __slots__ = ("_length", "_longest_s", "_since", "_step", "_until")

    def __init__(self, longest_s: float = MAX_REST_S) -> None:
        self._longest_s = longest_s
        self._since = NEVER
        self._until = NEVER
        self._length = 0.0
        self._step = 0.0

    def ends_at(self, now: float) -> float:
        """Not after ``now``: it is over."""
        if self._until - now > self._length:
            self._until = now + self._length
        return self._until

    def begin(self, now: float, began: float, asked_s: float | None) -> None:
        """A call that began at ``began`` was refused, with ``retry-after`` or without: then rests double, but calls
        that were already under way at the first refusal are no further reason."""
        if asked_s is not None and asked_s > 0:
            length = min(asked_s, MAX_ASKED_REST_S)
        elif began < self._since:
            return
        else:
            length = self._step = min(max(2 * self._step, FIRST_REST_S), self._longest_s)
        if began >= self._since:
            self._since = now
        if now + length > self.ends_at(now):
            self._until, self._length = now + length, length

    def went_well(self, began: float) -> None:
        """A call that began then was not refused."""
        if began >= self._until:
            self._step = 0.0

    def idle(self, now: float) -> bool:
        """Over, and so long ago that it says nothing of the next."""
        return self.ends_at(now) + MAX_REST_S <= now


class Credential:
    """A key or token and the calls made with it. ``turn``: grows with each use."""

    __slots__ = ("gauge", "rest", "running", "turn")

    def __init__(self, limit: Limit) -> None:
        self.gauge = Gauge(limit) if limit.any else None
        self.rest = Rest()
        self.running = 0
        self.turn = 0

    def ready_at(self, now: float, tokens: int) -> float:
        """When it may be used, as ``Gauge.ready_at``."""
        at = self.rest.ends_at(now)
        return at if self.gauge is None else max(at, self.gauge.ready_at(now, tokens))

    def not_before(self, now: float, tokens: int, ahead: int) -> float:
        """As ``Gauge.not_before``."""
        at = self.rest.ends_at(now)
        return at if self.gauge is None else max(at, self.gauge.not_before(now, tokens, ahead))

    def gauge_in_the_way(self, now: float) -> Gauge | None:
        """None: it rests."""
        return None if self.rest.ends_at(now) > now else self.gauge

    def idle(self, now: float) -> bool:
        """A new one would do the same."""
        return not self.running and self.rest.idle(now) and (self.gauge is None or self.gauge.idle(now))


class Keys:
    """The operator's keys of a provider, shared out evenly."""

    def __init__(self, count: int, limit: Limit) -> None:
        self.all = [Credential(limit) for _ in range(count)]
        self._turn = 0

    def pick(self, now: float, tokens: int, avoid: Collection[int]) -> int:
        """The one that may be used with the fewest calls under way, of those the one used longest ago; -1: none
        may. Where all are to be avoided none is."""
        best, found = -1, None
        for index in self._allowed(avoid):
            key = self.all[index]
            if found is not None and (key.running, key.turn) >= (found.running, found.turn):
                continue
            if key.ready_at(now, tokens) <= now:
                best, found = index, key
        return best

    def used(self, index: int) -> Credential:
        """A call starts with it."""
        self._turn += 1
        key = self.all[index]
        key.turn = self._turn
        return key

    def ready_at(self, now: float, tokens: int, avoid: Collection[int]) -> float:
        """When the first may be used."""
        return min(self.all[index].ready_at(now, tokens) for index in self._allowed(avoid))

    def not_before(self, now: float, tokens: int, avoid: Collection[int]) -> float:
        """A time before which surely none may."""
        return min(self.all[index].not_before(now, tokens, 0) for index in self._allowed(avoid))

    def first(self, now: float, tokens: int, avoid: Collection[int]) -> Credential:
        """The one to wait for."""
        return self.all[min(self._allowed(avoid), key=lambda index: self.all[index].ready_at(now, tokens))]

    def _allowed(self, avoid: Collection[int]) -> Collection[int]:
        every = range(len(self.all))
        return ([index for index in every if index not in avoid] or every) if avoid else every
