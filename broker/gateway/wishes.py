"""What the broker wants of each slot at the gateway, until it changes its mind: kept to be told again."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator

from broker.errors import Code, CortexError
from broker.gateway.messages import SlotEntry


class Wish:
    """``entry`` None: the slot is to be cut off. ``done`` resolves when the gateway has heard it, or refused;
    ``before``: what stands again if it is refused."""

    __slots__ = ("before", "done", "entry", "fds", "slot")

    def __init__(self, slot: str, entry: SlotEntry | None, fds: tuple[int, int] | None, before: Wish | None) -> None:
        self.slot = slot
        self.entry = entry
        self.fds = fds
        self.before = before
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.done.add_done_callback(_heard)

    def resolve(self) -> None:
        if not self.done.done():
            self.done.set_result(None)


class Wishes:
    """One standing wish a slot, with duplicates of its listeners: open while a wish that may yet be told has them."""

    def __init__(self) -> None:
        self._standing: dict[str, Wish] = {}
        self._owned: dict[str, set[tuple[int, int]]] = {}

    def __iter__(self) -> Iterator[Wish]:
        return iter(list(self._standing.values()))

    def __len__(self) -> int:
        return len(self._standing)

    def stands(self, wish: Wish) -> bool:
        """Not replaced, not refused, not settled."""
        return self._standing.get(wish.slot) is wish

    def put(self, entry: SlotEntry, fds: tuple[int, int] | None) -> Wish:
        """Wants ``entry``; without ``fds`` those of the wish before go on."""
        before = self._standing.get(entry.slot)
        own = before.fds if before is not None else None
        if fds is not None:
            own = _duplicate(fds)
            self._owned.setdefault(entry.slot, set()).add(own)
        wish = self._standing[entry.slot] = Wish(entry.slot, entry, own, before)
        return wish

    def drop(self, slot: str) -> Wish:
        """Wants the slot cut off; nothing that was wanted before comes back."""
        for wish in self._chain(slot):
            wish.resolve()
        dropped = self._standing[slot] = Wish(slot, None, None, None)
        self._release(slot)
        return dropped

    def heard(self, wish: Wish) -> None:
        """The gateway does as wished, so what was before has passed."""
        chain = self._chain(wish.slot)
        wish.resolve()
        if wish not in chain:
            return
        for older in chain[chain.index(wish) + 1 :]:
            older.resolve()
        wish.before = None
        if wish.entry is None and chain[0] is wish:
            del self._standing[wish.slot]
        self._release(wish.slot)

    def refused(self, wish: Wish, error: CortexError) -> None:
        """The gateway does as before, so that is what stands again."""
        if not wish.done.done():
            wish.done.set_exception(error)
        chain = self._chain(wish.slot)
        if wish not in chain:
            return
        at = chain.index(wish)
        if at:
            chain[at - 1].before = wish.before
        elif wish.before is not None:
            self._standing[wish.slot] = wish.before
        else:
            del self._standing[wish.slot]
        self._release(wish.slot)

    def settle_drops(self) -> None:
        """No gateway process lives, so nothing is served."""
        for wish in self:
            if wish.entry is None:
                self.heard(wish)

    def close(self) -> None:
        slots = list(self._standing)
        self._standing.clear()
        for slot in slots:
            self._release(slot)

    def _chain(self, slot: str) -> list[Wish]:
        """The standing wish and what it replaced and may fall back to, newest first."""
        chain = []
        wish = self._standing.get(slot)
        while wish is not None:
            chain.append(wish)
            wish = wish.before
        return chain

    def _release(self, slot: str) -> None:
        """Closes listeners that no wish has any more."""
        owned = self._owned.get(slot)
        if owned is None:
            return
        used = {wish.fds for wish in self._chain(slot)}
        for pair in [pair for pair in owned if pair not in used]:
            owned.remove(pair)
            os.close(pair[0])
            os.close(pair[1])
        if not owned:
            del self._owned[slot]


def _duplicate(fds: tuple[int, int]) -> tuple[int, int]:
    """Raises ``CortexError`` where the process has no descriptor left."""
    own: list[int] = []
    try:
        for fd in fds:
            own.append(os.dup(fd))
    except OSError as error:
        for fd in own:
            os.close(fd)
        raise CortexError(
            Code.INTERNAL, "The slot's listeners cannot be held", cause=error.strerror, hint="raise LimitNOFILE"
        ) from error
    return own[0], own[1]


def _heard(done: asyncio.Future[None]) -> None:
    """Takes note of an error whose caller has gone, so that it is not logged as lost."""
    if not done.cancelled():
        done.exception()
