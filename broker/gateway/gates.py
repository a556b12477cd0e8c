"""All limits of one provider together: what is in the way of a call, and what a call that goes takes up. Pure."""

from __future__ import annotations

from collections.abc import Collection, Hashable
from typing import Any, TypeVar

from broker.gateway.caller import Caller
from broker.gateway.limits import MAX_OVERLOAD_S, Cell, Credential, Gauge, Keys, Rest
from broker.gateway.policy import Limit, Limits
from broker.gateway.turns import Block, Reach

K = TypeVar("K", bound=Hashable)
Held = tuple[int, Credential | None, Collection[tuple[Gauge, Cell | None]]]
"""Index of the operator's key or -1, the credential where it is watched, and gauges with what ``end`` wants back."""
NOTHING_HELD: Held = (-1, None, ())


class Gates:
    """``plain``: no limit is set and nothing rests; ``kept``: there is something that ``sweep`` will drop one day."""

    def __init__(self, limits: Limits, keys: int) -> None:
        self._limits = limits
        self._by_user = limits.user.any
        self._by_sandbox = limits.sandbox.any
        self._by_credential = limits.credential.any
        self._provider = Gauge(limits.provider) if limits.provider.any else None
        self._rest = Rest(MAX_OVERLOAD_S)
        self._rested = False
        self._keys = Keys(keys, limits.credential)
        self._users: dict[str, Gauge] = {}
        self._sandboxes: dict[tuple[str, str], Gauge] = {}
        self._owned: dict[str, Credential] = {}
        self._unlimited = not (limits.provider.any or self._by_user or self._by_sandbox or self._by_credential)
        self.plain = self._unlimited
        self.kept = False
        self.shared_keys = keys > 0

    def start(self, caller: Caller, own: str, tokens: int, avoid: Collection[int], now: float) -> Held | Block:
        """The call begins, or what is in its way."""
        pooled = self.shared_keys and not own
        if self.plain and not pooled:
            return NOTHING_HELD
        key = self._keys.pick(now, tokens, avoid) if pooled else -1
        block = None if self.plain else self._obstacle(caller, own, tokens, avoid, key, now)
        if block is not None:
            return block
        credential = self._keys.used(key) if pooled else self._of_own(own)
        gauges = [self._provider, credential.gauge if credential is not None else None]
        if self._by_user:
            gauges.append(self._of_user(caller))
        if self._by_sandbox:
            gauges.append(self._of_sandbox(caller))
        if credential is not None:
            credential.running += 1
        return key, credential, [(gauge, gauge.begin(now, tokens)) for gauge in gauges if gauge is not None]

    def obstacle(self, caller: Caller, own: str, tokens: int, avoid: Collection[int], now: float) -> Block | None:
        """What is in the way of a call now."""
        key = self._keys.pick(now, tokens, avoid) if self.shared_keys and not own else -1
        return self._obstacle(caller, own, tokens, avoid, key, now)

    def _obstacle(
        self, caller: Caller, own: str, tokens: int, avoid: Collection[int], key: int, now: float
    ) -> Block | None:
        # What holds fewest others comes first: who cannot go anyhow must not hold them.
        if self._by_user:
            gauge = self._of_user(caller)
            at = gauge.ready_at(now, tokens)
            if at > now:
                return Block(at, Reach.USER, "user", gauge, lasting=True)
        if self._by_sandbox:
            gauge = self._of_sandbox(caller)
            at = gauge.ready_at(now, tokens)
            if at > now:
                return Block(at, Reach.LINE, "sandbox", gauge, lasting=True)
        if own:
            credential = self._of_own(own)
            if credential is not None and (at := credential.ready_at(now, tokens)) > now:
                return Block(at, Reach.LINE, "credential", credential.gauge_in_the_way(now))
        elif self.shared_keys and key < 0:
            credential = self._keys.first(now, tokens, avoid)
            at = credential.ready_at(now, tokens)
            return Block(at, Reach.LINE if avoid else Reach.POOL, "credential", credential.gauge_in_the_way(now))
        at = self._rest.ends_at(now)
        if at > now:
            return Block(at, Reach.ALL, "provider", None)
        if self._provider is not None and (at := self._provider.ready_at(now, tokens)) > now:
            return Block(at, Reach.ALL, "provider", self._provider)
        return None

    def not_before(
        self, caller: Caller, own: str, tokens: int, avoid: Collection[int], ahead: int, now: float
    ) -> Block:
        """What surely holds a call longest that ``ahead`` others of its sandbox go before; ``at`` is finite."""
        found = [Block(self._rest.ends_at(now), Reach.ALL, "provider", None)]
        watched = [("provider", Reach.ALL, self._provider)]
        if self._by_user:
            watched.append(("user", Reach.USER, self._of_user(caller)))
        if self._by_sandbox:
            watched.append(("sandbox", Reach.LINE, self._of_sandbox(caller)))
        for scope, reach, gauge in watched:
            if gauge is not None:
                found.append(Block(gauge.not_before(now, tokens, ahead), reach, scope, gauge))
        credential = self._of_own(own)
        if credential is not None:
            at = credential.not_before(now, tokens, ahead)
            found.append(Block(at, Reach.LINE, "credential", credential.gauge_in_the_way(now)))
        elif self.shared_keys and not own:
            credential = self._keys.first(now, tokens, avoid)
            at = self._keys.not_before(now, tokens, avoid)
            found.append(Block(at, Reach.POOL, "credential", credential.gauge_in_the_way(now)))
        return max(found, key=lambda block: block.at)

    def rests(
        self, own: str, credential: Credential | None, now: float, began: float, asked_s: float | None, overload: bool
    ) -> float:
        """The provider refused a call that began at ``began``; until when what rests does."""
        rest = self._rest
        if not overload and credential is None and own:
            credential = self._owned.setdefault(own, Credential(self._limits.credential))
        if not overload and credential is not None:
            rest = credential.rest
        rest.begin(now, began, asked_s)
        self._rested = self.kept = True
        self.plain = False
        return rest.ends_at(now)

    def went_well(self, began: float) -> None:
        """A call that began then was not refused."""
        self._rest.went_well(began)

    def sweep(self, now: float) -> None:
        """Drops what says nothing any more."""
        _drop_idle(self._users, now)
        _drop_idle(self._sandboxes, now)
        _drop_idle(self._owned, now)
        if self._rested:
            self._rested = not (self._rest.idle(now) and all(key.rest.idle(now) for key in self._keys.all))
        self.kept = bool(self._users or self._sandboxes or self._owned or self._rested)
        self.plain = self._unlimited and not self._rested and not self._owned

    def view(self, now: float) -> dict[str, Any]:
        """For people and metrics."""
        return {
            "resting_s": max(0.0, self._rest.ends_at(now) - now),
            "keys": [
                {"running": key.running, "resting_s": max(0.0, key.rest.ends_at(now) - now)} for key in self._keys.all
            ],
            "watched": len(self._users) + len(self._sandboxes) + len(self._owned),
        }

    def _of_user(self, caller: Caller) -> Gauge:
        return self._users.get(caller.user) or self._watch(self._users, caller.user, self._limits.user)

    def _of_sandbox(self, caller: Caller) -> Gauge:
        # A slot may have had another user a moment ago.
        name = (caller.user, caller.slot)
        return self._sandboxes.get(name) or self._watch(self._sandboxes, name, self._limits.sandbox)

    def _of_own(self, own: str) -> Credential | None:
        if not own:
            return None
        credential = self._owned.get(own)
        if credential is None and self._by_credential:
            credential = self._owned[own] = Credential(self._limits.credential)
            self.kept = True
        return credential

    def _watch(self, table: dict[K, Gauge], name: K, limit: Limit) -> Gauge:
        self.kept = True
        gauge = table[name] = Gauge(limit)
        return gauge


def _drop_idle(table: dict[K, Gauge] | dict[K, Credential], now: float) -> None:
    for name in [name for name, each in table.items() if each.idle(now)]:
        del table[name]
