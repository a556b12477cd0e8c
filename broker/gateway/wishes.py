"""What the broker wants of each slot at the gateway, until it changes its mind: kept to be told again."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator

from broker.errors import CortexError
from broker.gateway.messages import SlotEntry


class Wish:
    """``entry`` None: the slot is to be cut off. ``done`` resolves when the gateway has heard it, or refused."""

    __slots__ = ("before", "done", "entry", "fds", "slot")

    def __init__(self, slot: str, entry: SlotEntry | None, fds: tuple[int, int] | None, before: Wish | None) -> None:
        self.slot = slot
        self.entry = entry
        self.fds = fds
        self.before = before
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.done.add_done_callback(_heard)


class Wishes:
    """One standing wish a slot, with duplicates of its listeners."""

    def __init__(self) -> None:
        self._standing: dict[str, Wish] = {}

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
        own = (os.dup(fds[0]), os.dup(fds[1])) if fds is not None else (before.fds if before else None)
        return self._stand(Wish(entry.slot, entry, own, before))

    def drop(self, slot: str) -> Wish:
        """Wants the slot cut off."""
        before = self._standing.get(slot)
        wish = self._stand(Wish(slot, None, None, None))
        if before is not None:
            self._forget(before)
            self._resolve(before)
        return wish

    def heard(self, wish: Wish) -> None:
        """The gateway does as wished."""
        if self.stands(wish) and wish.entry is None:
            del self._standing[wish.slot]
        before, wish.before = wish.before, None
        while before is not None:
            self._resolve(before)
            if before.fds != wish.fds:
                _close(before.fds)
            before = before.before
        self._resolve(wish)

    def refused(self, wish: Wish, error: CortexError) -> None:
        """The gateway does as before, so that is what stands again."""
        if self.stands(wish):
            if wish.before is not None:
                self._standing[wish.slot] = wish.before
            else:
                del self._standing[wish.slot]
            if wish.before is None or wish.before.fds != wish.fds:
                _close(wish.fds)
        if not wish.done.done():
            wish.done.set_exception(error)

    def settle_drops(self) -> None:
        """No gateway process lives, so nothing is served."""
        for wish in self:
            if wish.entry is None:
                self.heard(wish)

    def close(self) -> None:
        for wish in self:
            self._forget(wish)
        self._standing.clear()

    def _stand(self, wish: Wish) -> Wish:
        self._standing[wish.slot] = wish
        return wish

    def _forget(self, wish: Wish) -> None:
        """Closes the listeners of a wish and of those it replaced."""
        open_fds: set[int] = set()
        each: Wish | None = wish
        while each is not None:
            open_fds |= set(each.fds or ())
            each = each.before
        for fd in open_fds:
            os.close(fd)

    @staticmethod
    def _resolve(wish: Wish) -> None:
        if not wish.done.done():
            wish.done.set_result(None)


def _close(fds: tuple[int, int] | None) -> None:
    for fd in fds or ():
        os.close(fd)


def _heard(done: asyncio.Future[None]) -> None:
    """Takes note of an error whose caller has gone, so that it is not logged as lost."""
    if not done.cancelled():
        done.exception()
