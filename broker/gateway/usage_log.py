"""The gateway's records of calls until the broker has stored them: told in batches, told again when in doubt.

A record has its id from here for good, so the broker counts one that it hears twice only once.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Any, Protocol

import structlog

from broker.gateway.records import Record, to_wire

EVERY_S = 0.25
BATCH = 100
WINDOW = 10 * BATCH
"""Records that are told and not yet known to be stored, at most."""
AGAIN_S = 10.0
"""What the broker has not stored by then is told again."""
MAX_KEPT = 20_000
log = structlog.get_logger(__name__)


class Timer(Protocol):
    def cancel(self) -> None: ...


class UsageLog:
    """``send`` tells the broker and says whether it could; ``call_later`` is the event loop's.

    ``lost``: records that had to make room for newer ones while no broker came.
    """

    def __init__(
        self, send: Callable[[dict[str, Any]], bool], call_later: Callable[[float, Callable[[], None]], Timer]
    ) -> None:
        self.boot = secrets.token_hex(6)
        self.lost = 0
        self._send = send
        self._call_later = call_later
        self._kept: deque[Record] = deque()
        self._next = 1
        """Number of the next record; those kept are the ones right before it."""
        self._lost_told = 0
        self._told = 0
        """Number of the last that was told."""
        self._timer: Timer | None = None
        self._doubt: Timer | None = None

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, record: Record) -> None:
        """Takes a record and gives it its id."""
        record.id = f"{self.boot}-{self._next}"
        self._next += 1
        self._kept.append(record)
        if len(self._kept) > MAX_KEPT:
            self._kept.popleft()
            self.lost += 1
            self._told = max(self._told, self._before)
        if self._next - 1 - self._told == BATCH:
            self.flush()
        if self._timer is None:
            self._timer = self._call_later(EVERY_S, self._due)

    def seen(self, boot: str, upto: int) -> None:
        """The broker has stored all of ``boot`` up to number ``upto``."""
        if boot != self.boot:
            return
        while self._kept and self._before < min(upto, self._told):
            self._kept.popleft()
        self._rest_doubt()
        self.flush()

    def linked(self) -> None:
        """A broker has come: what is not known to be stored is told anew."""
        self._told = self._before
        self._rest_doubt()
        if self.lost > self._lost_told:
            log.error("usage_lost", count=self.lost - self._lost_told)
            self._lost_told = self.lost
        self.flush()

    def flush(self) -> None:
        """Tells what may be told now."""
        while self._told < self._next - 1 and self._told - self._before < WINDOW:
            start = self._told - self._before
            batch = list(islice(self._kept, start, start + BATCH))
            facts = {"kind": "usage", "boot": self.boot, "upto": self._told + len(batch)}
            if not self._send({**facts, "records": [to_wire(record) for record in batch]}):
                break
            self._told += len(batch)
        if self._told > self._before and self._doubt is None:
            self._doubt = self._call_later(AGAIN_S, self.linked)

    def close(self) -> None:
        """Tells what it can, then rests."""
        self.flush()
        for timer in (self._timer, self._doubt):
            if timer is not None:
                timer.cancel()
        self._timer = self._doubt = None

    @property
    def _before(self) -> int:
        """Number of the last record that is no longer kept."""
        return self._next - 1 - len(self._kept)

    def _due(self) -> None:
        self._timer = None
        self.flush()
        # Not all could be told: the link is busy or away.
        if self._told < self._next - 1 and self._told - self._before < WINDOW:
            self._timer = self._call_later(EVERY_S, self._due)

    def _rest_doubt(self) -> None:
        if self._doubt is not None:
            self._doubt.cancel()
            self._doubt = None
