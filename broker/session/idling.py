"""How long nobody has asked for a session: its uses, the timer of the next look, and what idling costs.

Uses are noted where they happen and cost a clock reading; a timer that is set too early looks, finds
that it was, and is set again. So a session in use never touches its timer.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from math import inf
from typing import Any, Literal

from broker.config import PoolConfig
from broker.metrics import IDLE_SECONDS
from broker.session.activity import ActivityPort
from broker.session.clients import Clients
from broker.session.idle import Action, Facts, Look, keep, look
from broker.session.life import Life
from sandbox_agent.wire.messages import Status

REQUESTS = 1000
"""Turns that are remembered at most."""
AT_ONCE = 16
"""Turns that are believed to have begun between two words of an agent server."""
RETRY_S = 30.0
"""After a pause or a stop that could not be done."""

Idle = Literal["ready", "paused"]


class Idling:
    """``at_work``: a turn or an install is under way; ``act`` is called when it is time to pause or stop.

    ``clock`` gives seconds since the epoch, ``steady`` seconds that never jump: idleness is measured by the latter.
    """

    def __init__(
        self,
        user: str,
        life: Life,
        clients: Clients,
        *,
        config: Callable[[], PoolConfig],
        activity: ActivityPort,
        at_work: Callable[[], bool],
        act: Callable[[], None],
        clock: Callable[[], float],
        steady: Callable[[], float],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._user = user
        self._life = life
        self._clients = clients
        self._config = config
        self._activity = activity
        self._at_work = at_work
        self._act = act
        self._clock = clock
        self._steady = steady
        self._used_at = -inf
        self._requests: deque[float] = deque(maxlen=REQUESTS)
        self._turns = -1
        self._open_turns = 0
        self._kept: tuple[float, float] = (-inf, 0.0)
        self._was_at_work = False
        self._roused_at = self._kept_until = self._not_before = -inf
        self._timer: asyncio.TimerHandle | None = None
        self._due = inf
        self._since = steady()
        self._doing: Idle | None = None
        self._idle_s: dict[Idle, float] = {"ready": 0.0, "paused": 0.0}
        self._told: dict[Idle, float] = dict(self._idle_s)

    # -- what happens --------------------------------------------------------------------------

    def used(self) -> None:
        """Somebody asks for it."""
        self._used_at = self._steady()

    def request(self) -> None:
        """A turn begins, or what counts as one."""
        self.used()
        self._requests.append(self._used_at)
        self._kept = (-inf, 0.0)

    def left(self) -> None:
        """A client is gone."""
        self.used()
        if not self._clients:
            self.look()

    def expected(self) -> None:
        """Somebody will come: it is kept for them, if it is brought up for them or not."""
        pool = self._config()
        self._roused_at = self._steady()
        self._kept_until = self._roused_at + max(pool.idle.fallback_keep_s, pool.forecast.lead_s)

    def unexpected(self) -> None:
        """Nobody is expected any more; it is kept as its last use asks for."""
        self._roused_at = self._kept_until = -inf

    def heard(self, status: Status) -> None:
        """Its agent server says how it is."""
        if 0 <= self._turns < status.turns:
            for _ in range(min(status.turns - self._turns, AT_ONCE)):
                self.request()
                self._activity.note(self._user, self._clock(), "request")
        self._turns = status.turns
        before, self._open_turns = self._open_turns, status.open_turns
        if before and not status.open_turns:
            self.used()
            self.look()
        elif status.open_turns and not before:
            self.account()

    def came_up(self, *, adopted: bool) -> None:
        """Its sandbox is ready. An adopted one was used a moment ago, as far as is known."""
        self._turns = -1 if adopted else 0
        if adopted:
            self._used_at = self._steady()
        self.look()

    def postpone(self) -> None:
        """What was to be done could not be."""
        self._not_before = self._steady() + RETRY_S
        self.look()

    @property
    def idle_s(self) -> float:
        """Seconds since anybody asked for it, or it was made ready for somebody."""
        return self._steady() - max(self._used_at, self._clients.spoke_at, self._roused_at)

    # -- what follows --------------------------------------------------------------------------

    @property
    def action(self) -> Action:
        """What to do with it now."""
        return self._decide().action

    def _decide(self) -> Look:
        settings, now = self._config().idle, self._steady()
        if self._life.state not in ("ready", "paused") or now < self._not_before:
            return Look(Action.STAY, self._not_before if now < self._not_before else None)
        self._was_at_work = self._at_work()
        facts = Facts(
            paused=self._life.state == "paused",
            at_work=self._was_at_work,
            clients=len(self._clients),
            used_at=max(self._used_at, self._clients.spoke_at),
            keep_s=self._keep(),
            kept_until=self._kept_until,
            roused_at=self._roused_at,
        )
        return look(facts, settings, now)

    def _keep(self) -> float:
        """Seconds to keep it after its last use; asked for once after each."""
        used_at, kept = self._kept
        if used_at != self._used_at:
            at = self._clock() - (self._steady() - self._used_at)
            pattern = self._activity.keep_for(self._user, at) if self._used_at > -inf else None
            kept = keep(self._requests, self._used_at, pattern, self._config().idle)
            self._kept = (self._used_at, kept)
        return kept

    def look(self) -> None:
        """Something has changed: has it done what is due, or sets the timer, unless it is set early enough."""
        self.account()
        if self._life.closed:
            return
        found = self._decide()
        if found.action is not Action.STAY:
            self._act()
        elif found.at is not None and not (self._timer is not None and self._due <= found.at):
            self._set(found.at)

    def watch(self) -> None:
        """The work that was under way when it was last looked at may be over."""
        if self._was_at_work or self._timer is None:
            self.look()

    def settings_changed(self) -> None:
        """Other times are in force."""
        self._kept = (-inf, 0.0)
        self.look()

    def _set(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._due = at
        self._timer = self._loop.call_later(max(0.0, at - self._steady()), self._timed)

    def _timed(self) -> None:
        self._timer = None
        self.look()

    # -- what it costs -------------------------------------------------------------------------

    def account(self) -> None:
        """Counts the time since the last call for what the session was doing, and sees what it does now."""
        now = self._steady()
        if self._doing is not None:
            self._idle_s[self._doing] += now - self._since
        self._since = now
        self._doing = self._idle()

    def _idle(self) -> Idle | None:
        if self._life.state == "paused":
            return "paused"
        return "ready" if self._life.state == "ready" and not self._clients and not self._at_work() else None

    def tick(self) -> None:
        """Now and then: the metrics hear of it, and what was not looked at is."""
        self.watch()
        self._tell()

    def _tell(self) -> None:
        self.account()
        for state, seconds in self._idle_s.items():
            if seconds != self._told[state]:
                IDLE_SECONDS.labels(state).inc(seconds - self._told[state])
        self._told = dict(self._idle_s)

    def view(self) -> dict[str, Any]:
        """For operators; seconds, and the operator's money where he said what a sandbox costs."""
        self.account()
        pool, now = self._config(), self._steady()
        found = self._decide()
        cost = sum(self._idle_s.values()) / 3600 * pool.cost_per_hour
        return {
            "idle_s": round(self.idle_s, 1) if self.idle_s < inf else None,
            "ready_s": round(self._idle_s["ready"], 1),
            "paused_s": round(self._idle_s["paused"], 1),
            "cost": round(cost, 6) if pool.cost_per_hour else None,
            "next_look_s": round(found.at - now, 1) if found.at is not None else None,
        }

    def close(self) -> None:
        """The session leaves memory."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._tell()
