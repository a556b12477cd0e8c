"""Calls to one provider, let in one by one: at once where no limit is in the way, else in turn.

Of asyncio it needs ``loop.call_at`` alone, one timer at a time. What is kept of users, sandboxes and
credentials goes a minute or two after their last call.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, Protocol

from broker.errors import CortexError
from broker.gateway import refusals
from broker.gateway.caller import Caller
from broker.gateway.gates import NOTHING_HELD, Gates, Held
from broker.gateway.limits import MINUTE_S, NEVER, Credential
from broker.gateway.policy import Limits
from broker.gateway.turns import Block, Turns

LATE_S = 0.0005
"""uvloop rounds timers to milliseconds; this much later none is early."""
NONE: frozenset[int] = frozenset()


class Cancellable(Protocol):
    def cancel(self) -> object: ...


class Ticket:
    """A call that may go. ``key``: index into the policy's keys; -1: the slot's own credential, or none."""

    __slots__ = (
        "_admission",
        "_began",
        "_credential",
        "_gauges",
        "_over",
        "_own",
        "_refused",
        "_tokens",
        "_user",
        "key",
    )

    def __init__(self, admission: Admission, user: str, own: str, tokens: int, began: float, held: Held) -> None:
        self.key, self._credential, self._gauges = held
        self._admission = admission
        self._user = user
        self._own = own
        self._tokens = tokens
        self._began = began
        self._over = False
        self._refused = False

    def limited(self, now: float, retry_after_s: float | None, *, overload: bool = False) -> None:
        """The provider answered 429, so the credential rests; ``overload``: 503 or 529, so all of the provider does.
        Without ``retry-after`` the rest is 1 s, then doubles."""
        self._refused = True
        self._admission._rests(self._own, self._credential, now, self._began, retry_after_s, overload)

    def answered(self) -> None:
        """The provider has begun to answer the call, so the next rest that it does not measure itself is short again.
        Without this word, that is known at the end of the call only."""
        if not self._refused:
            if self._credential is not None:
                self._credential.rest.went_well(self._began)
            self._admission._answered(self._began)

    def release(self, now: float, tokens: int | None) -> None:
        """The call is over; ``tokens`` as reported, None: unknown, so what was reserved stands. Again: nothing."""
        if self._over:
            return
        self._over = True
        if self._credential is not None:
            self._credential.running -= 1
        for gauge, cell in self._gauges:
            gauge.end(now, cell, self._tokens, tokens)
        self.answered()
        self._admission._ended(self._user, now)


class Waiting:
    """A call that waits for its turn; hears ``granted`` or ``refused``, once, unless it is cancelled."""

    __slots__ = (
        "_admission", "avoid", "caller", "error", "granted", "line", "number", "over", "own", "pooled", "refused",
        "since", "ticket", "tokens", "user",
    )  # fmt: skip

    def __init__(
        self, admission: Admission, caller: Caller, own: str, tokens: int, granted: Callable[[Ticket], None],
        refused: Callable[[CortexError], None], avoid: frozenset[int], since: float, number: int, pooled: bool,
    ) -> None:  # fmt: skip
        self._admission = admission
        self.caller = caller
        self.user = caller.user
        self.own = own
        self.line = (caller.slot, own)
        self.tokens = tokens
        self.granted = granted
        self.refused = refused
        self.avoid = avoid
        self.since = since
        self.number = number
        self.pooled = pooled
        self.ticket: Ticket | None = None
        self.error: CortexError | None = None
        self.over = False
        """It was told, or is cancelled."""

    def cancel(self) -> None:
        """Nobody waits any more: nothing is called. Too late: nothing."""
        if not self.over:
            self.over = True
            self._admission._cancelled(self)


class Admission:
    """Of one provider. ``now`` and ``call_at``: seconds of one monotonic clock, as the loop's."""

    def __init__(
        self,
        name: str,
        limits: Limits,
        keys: int,
        call_at: Callable[[float, Callable[[], None]], Cancellable],
        now: Callable[[], float],
    ) -> None:
        self.running = 0
        self._name = name
        self._limits = limits
        self._call_at = call_at
        self._now = now
        self._gates = Gates(limits, keys)
        self._turns: Turns[Waiting] = Turns()
        self._by_age: OrderedDict[Waiting, None] = OrderedDict()
        self._number = 0
        self._decided: deque[Waiting] = deque()
        """Granted or refused and not told yet."""
        self._telling = False
        self._spent_users: frozenset[str] = frozenset()
        self._spent_teams: frozenset[str] = frozenset()
        self._spent_until = NEVER
        self._seen = NEVER
        self._wake_at = math.inf
        self._sweep_at = math.inf
        self._timer: Cancellable | None = None
        self._timer_at = math.inf

    @property
    def waiting(self) -> int:
        """Calls that wait."""
        return self._turns.count

    def view(self) -> dict[str, Any]:
        """For people and metrics."""
        return {
            "running": self.running,
            "waiting": self._turns.count,
            "waiting_users": self._turns.users,
            **self._gates.view(self._now()),
        }

    # -- callers

    def enter(
        self,
        caller: Caller,
        own: str,
        tokens: int,
        granted: Callable[[Ticket], None],
        refused: Callable[[CortexError], None],
        avoid: frozenset[int] = NONE,
    ) -> Ticket | Waiting:
        """``own``: name of the slot's own credential, "": one of the operator's keys, if possible none in ``avoid``;
        ``tokens``: about as many as the call will use. A ``Waiting`` hears one of ``granted`` and ``refused`` later,
        never from within this call. Raises ``CortexError`` (``GATEWAY_LIMITED``, ``BUDGET_SPENT``; detail
        ``retry_after_s``) where a call cannot go within ``wait_s`` or too many wait."""
        gates = self._gates
        if self._spent_until == NEVER and gates.plain and (own or not gates.shared_keys) and not self._turns.count:
            self.running += 1
            return Ticket(self, caller.user, own, tokens, NEVER, NOTHING_HELD)
        now = self._now()
        if self._spent_until != NEVER:
            self._check_budget(caller, now)
        if not self._turns.count:
            held = gates.start(caller, own, tokens, avoid, now)
            if not isinstance(held, Block):
                if gates.kept and self._sweep_at == math.inf:
                    self._arm(now)
                self.running += 1
                return Ticket(self, caller.user, own, tokens, now, held)
        self._number += 1
        pooled = gates.shared_keys and not own
        waiting = Waiting(self, caller, own, tokens, granted, refused, avoid, now, self._number, pooled)
        return self._wait(waiting, now)

    def spent(self, users: Collection[str], teams: Collection[str], until: float) -> None:
        """Whose budget is used up: refused until then. Takes the place of what was said before."""
        now = self._now()
        self._spent_users, self._spent_teams = frozenset(users), frozenset(teams)
        self._spent_until = until if users or teams else NEVER
        for waiting in list(self._by_age):
            error = self._over_budget(waiting.caller, now)
            if error is not None:
                self._refuse(waiting, error)
        self._go_on(now)

    def refuses(self, caller: Caller) -> bool:
        """The budget of ``caller`` is used up: not even a call of somebody else's may carry theirs."""
        return self._spent_until != NEVER and self._over_budget(caller, self._now()) is not None

    def _wait(self, waiting: Waiting, now: float) -> Ticket | Waiting:
        ahead = self._turns.add(waiting)
        self._by_age[waiting] = None
        self._serve(now)
        ticket = waiting.ticket
        if ticket is not None:
            waiting.over = True
            self._decided.remove(waiting)
        else:
            error = self._hopeless(waiting, ahead, now) or self._crowded(waiting, now)
            if error is not None:
                self._forget(waiting)
                self._arm(now)
                raise error
        self._arm(now)
        return waiting if ticket is None else ticket

    def _check_budget(self, caller: Caller, now: float) -> None:
        if now >= self._spent_until:
            self._spent_until = NEVER
        error = self._over_budget(caller, now)
        if error is not None:
            raise error

    def _over_budget(self, caller: Caller, now: float) -> CortexError | None:
        left_s = self._spent_until - now
        if left_s > 0 and caller.user in self._spent_users:
            return refusals.spent("user", left_s)
        if left_s > 0 and caller.team in self._spent_teams:
            return refusals.spent("team", left_s)
        return None

    def _hopeless(self, waiting: Waiting, ahead: int, now: float) -> CortexError | None:
        block = self._gates.not_before(waiting.caller, waiting.own, waiting.tokens, waiting.avoid, ahead, now)
        if block.at <= waiting.since + self._limits.wait_s:
            return None
        return refusals.limited(self._name, block, waiting.tokens, now, block.at - now)

    def _crowded(self, waiting: Waiting, now: float) -> CortexError | None:
        """Too many wait: then the last of the user with the most must go, which may be another one."""
        limit = self._limits.waiting
        if self._turns.count <= limit:
            return None
        crowd = self._turns.crowd()
        error = refusals.crowded(self._name, limit, self._least_wait_s(waiting, now))
        if not limit or crowd.count <= self._turns.waiting_of(waiting.user):
            return error
        self._refuse(crowd.newest(), error)
        return None

    def _least_wait_s(self, waiting: Waiting, now: float) -> float:
        block = self._gates.not_before(waiting.caller, waiting.own, waiting.tokens, waiting.avoid, 0, now)
        return block.at - now

    # -- tickets and waiting calls

    def _answered(self, began: float) -> None:
        if not self._gates.plain:
            self._gates.went_well(began)

    def _ended(self, user: str, now: float) -> None:
        self.running -= 1
        if self._turns.count:
            self._turns.ended(user)
            self._go_on(now)

    def _rests(
        self, own: str, credential: Credential | None, now: float, began: float, asked_s: float | None, overload: bool
    ) -> None:
        until = self._gates.rests(own, credential, now, began, asked_s, overload)
        # Those whose time is over before the rest is need not wait for it.
        if self._by_age and until > next(iter(self._by_age)).since + self._limits.wait_s:
            for waiting in list(self._by_age):
                error = self._hopeless(waiting, 0, now)
                if error is not None:
                    self._refuse(waiting, error)
        self._go_on(now)

    def _cancelled(self, waiting: Waiting) -> None:
        now = self._now()
        if waiting.ticket is not None:
            waiting.ticket.release(now, 0)
        elif waiting.error is None:
            self._forget(waiting)
            self._go_on(now)

    # -- the queue

    def _go_on(self, now: float) -> None:
        self._serve(now)
        self._tell(now)

    def _serve(self, now: float) -> None:
        """Decides on all that can go now."""
        if now < self._seen:
            self._turns.look_again()
        self._seen = now
        start = partial(self._start, now)
        self._wake_at = math.inf
        while self._turns.count:
            at = self._turns.serve(now, start)
            if at != -math.inf:
                self._wake_at = at
                return

    def _start(self, now: float, waiting: Waiting) -> Block | None:
        held = self._gates.start(waiting.caller, waiting.own, waiting.tokens, waiting.avoid, now)
        if isinstance(held, Block):
            return held
        self.running += 1
        waiting.ticket = Ticket(self, waiting.user, waiting.own, waiting.tokens, now, held)
        del self._by_age[waiting]
        self._decided.append(waiting)
        return None

    def _refuse(self, waiting: Waiting, error: CortexError) -> None:
        self._forget(waiting)
        waiting.error = error
        self._decided.append(waiting)

    def _forget(self, waiting: Waiting) -> None:
        self._turns.remove(waiting)
        del self._by_age[waiting]

    def _tell(self, now: float) -> None:
        """Whoever is told may enter, release and cancel; what that decides is told by the outermost call."""
        if self._telling:
            return
        self._telling = True
        try:
            while self._decided:
                waiting = self._decided.popleft()
                if waiting.over:
                    continue
                waiting.over = True
                if waiting.ticket is not None:
                    waiting.granted(waiting.ticket)
                elif waiting.error is not None:
                    waiting.refused(waiting.error)
        finally:
            self._telling = False
            self._arm(now)

    def _overdue(self, now: float) -> bool:
        """Refuses those that have waited for too long; whether there were any."""
        any_were = False
        while self._by_age:
            waiting = next(iter(self._by_age))
            if waiting.since + self._limits.wait_s > now:
                break
            any_were = True
            block = self._gates.obstacle(waiting.caller, waiting.own, waiting.tokens, waiting.avoid, now)
            left_s = self._least_wait_s(waiting, now)
            if block is None:  # a call in front of it is held
                error = refusals.crowded(self._name, self._turns.count, left_s)
            else:
                left_s = max(left_s, block.at - now) if block.at != math.inf else left_s
                error = refusals.limited(self._name, block, waiting.tokens, now, left_s, self._limits.wait_s)
            self._refuse(waiting, error)
        return any_were

    # -- the timer

    def _arm(self, now: float) -> None:
        if self._sweep_at == math.inf and self._gates.kept:
            self._sweep_at = now + MINUTE_S
        at = min(self._wake_at, self._sweep_at)
        if self._by_age:
            at = min(at, next(iter(self._by_age)).since + self._limits.wait_s)
        if self._decided and not self._telling:
            at = now
        if at >= self._timer_at and at != math.inf:
            return  # it comes earlier and looks again
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._timer_at = at
        if at != math.inf:
            self._timer = self._call_at(at + LATE_S, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._timer_at = math.inf
        now = self._now()
        self._serve(now)
        if self._overdue(now):
            self._serve(now)
        if now >= self._sweep_at:
            self._sweep_at = math.inf
            self._gates.sweep(now)
        self._tell(now)
