"""The warm sandboxes of one agent, in the order in which they are handed out. No I/O."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Literal

from broker.session.breaker import Breaker
from broker.session.pool_policy import Short, Stock
from broker.session.sandbox import Sandbox

GUESS_BYTES = 160 * 2**20
"""What a warm sandbox is taken to need until one was measured."""
RECENT = 100
"""Claims that the recent hit rate is of."""

Phase = Literal["hot", "resuming", "paused", "pausing"]
HOT, RESUMING, ASLEEP = (0, 1), (2,), (3, 4)
"""Rows of a shelf, the best first; of two rows of a kind the first has conversations that are open."""


@dataclass(eq=False)
class Member:
    """A warm sandbox on its shelf. ``image``: id of what it was made from, where that is known; ``tasks`` look after
    it; ``probe`` is the one that asks it how it is, while it is not paused."""

    box: Sandbox
    image: str = ""
    phase: Phase = "hot"
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    probe: asyncio.Task[None] | None = None

    @property
    def ahead(self) -> str:
        """Its conversation that is opened ahead: "", opening, open or failed."""
        return self.box.status.ahead if self.box.status else ""

    @property
    def row(self) -> int | None:
        """Where it stands; None: it cannot be handed out just now."""
        if self.phase == "pausing":
            return None
        if self.phase == "resuming":
            return RESUMING[0]
        rows = HOT if self.phase == "hot" else ASLEEP
        return rows[0] if self.ahead == "open" else rows[1]

    def let_be(self) -> None:
        """Nobody looks after it any more."""
        for task in (*self.tasks, self.probe):
            if task is not None:
                task.cancel()
        self.tasks.clear()
        self.probe = None


Row = OrderedDict[Member, None]


class Shelf:
    """``recipe``: what its sandboxes have to be made with; ``refused``: why there is none; ``short``: why there are
    too few; ``making``: how many are on their way."""

    def __init__(self, agent: str) -> None:
        self.agent = agent
        self.recipe = ""
        self.refused = ""
        self.short: Short = ""
        self.making = 0
        self.breaker = Breaker()
        self.claims: Counter[str] = Counter()
        self.recent: deque[bool] = deque(maxlen=RECENT)
        self.idle_s = 0.0
        """Seconds that its sandboxes were warm, all together."""
        self._counted_at: float | None = None
        self._costs: deque[int] = deque(maxlen=16)
        # Of a plain dict whose first entries are gone the next first one is not found in constant time.
        self._rows: tuple[Row, ...] = tuple(OrderedDict() for _ in (*HOT, *RESUMING, *ASLEEP))
        self._pausing: Row = OrderedDict()
        self._at: dict[Member, Row] = {}
        self._ending: dict[str, Sandbox] = {}
        self._stuck: set[str] = set()

    # -- members -------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._at)

    def __iter__(self) -> Iterator[Member]:
        return iter(list(self._at))

    def __contains__(self, member: Member) -> bool:
        return member in self._at

    def put(self, member: Member) -> None:
        """Puts it where it belongs now; called again whenever that may have changed."""
        row = member.row
        there = self._pausing if row is None else self._rows[row]
        before = self._at.get(member)
        if before is there:
            return
        if before is not None:
            del before[member]
        there[member] = None
        self._at[member] = there

    def remove(self, member: Member) -> None:
        """It is no longer the pool's, or has to end."""
        del self._at.pop(member)[member]

    def best(self) -> Member | None:
        """The one to hand out next, the oldest of its row."""
        return next((next(iter(row)) for row in self._rows if row), None)

    def worst(self, count: int) -> list[Member]:
        """Those that are missed least, when some have to end."""
        return list(islice(chain(self._pausing, *reversed(self._rows)), count))

    def to_pause(self, count: int) -> list[Member]:
        """Those that had rather sleep: without a conversation first, then the youngest."""
        opened, other = (self._rows[row] for row in HOT)
        still = (member for member in chain(reversed(other), reversed(opened)) if member.ahead != "opening")
        return list(islice(still, count))

    def to_resume(self, count: int) -> list[Member]:
        """Those to wake, the best first."""
        return list(islice(chain.from_iterable(self._rows[row] for row in ASLEEP), count))

    # -- those on their way out ----------------------------------------------------------------

    def ends(self, box: Sandbox, *, stuck: bool = False) -> None:
        """It is being put away; ``stuck``: that failed, and is tried again."""
        self._ending[box.slot.id] = box
        if stuck:
            self._stuck.add(box.slot.id)

    def ended(self, box: Sandbox) -> None:
        """It is gone."""
        del self._ending[box.slot.id]
        self._stuck.discard(box.slot.id)

    @property
    def leaving(self) -> tuple[Sandbox, ...]:
        """All that are being put away."""
        return tuple(self._ending.values())

    @property
    def stuck(self) -> int:
        """How many could not be put away yet."""
        return len(self._stuck)

    @property
    def empty(self) -> bool:
        """There is nothing of it, and nothing on its way."""
        return not (self._at or self._ending or self.making)

    # -- figures -------------------------------------------------------------------------------

    def measured(self, size: int) -> None:
        """A warm sandbox of it takes so many bytes."""
        if size > 0:
            self._costs.append(size)

    @property
    def cost(self) -> int:
        """Bytes that one takes: the mean of those measured last, else a guess."""
        return sum(self._costs) // len(self._costs) if self._costs else GUESS_BYTES

    @property
    def known(self) -> bool:
        """One was measured."""
        return bool(self._costs)

    def claimed(self, result: str) -> None:
        """A claim: hit, empty or stale."""
        self.claims[result] += 1
        self.recent.append(result == "hit")

    def sizes(self) -> dict[str, int]:
        """How many are making, hot, paused and ending. One that is about to be paused still runs."""
        hot = sum(len(self._rows[row]) for row in HOT) + len(self._pausing)
        return {"making": self.making, "hot": hot, "paused": len(self) - hot, "ending": len(self._ending)}

    def pass_time(self, now: float) -> None:
        """Counts what idled until ``now`` (monotonic seconds); to be called before a number changes."""
        if self._counted_at is not None:
            self.idle_s += max(0.0, now - self._counted_at) * len(self)
        self._counted_at = now

    def stock(self, *, wanted: int, maximum: int, hot: int, now: float) -> Stock:
        """What the policy decides on."""
        hot_now = sum(len(self._rows[row]) for row in HOT)
        return Stock(
            agent=self.agent,
            wanted=wanted,
            maximum=maximum,
            hot=hot,
            making=self.making,
            ready=len(self),
            awake=hot_now + len(self._rows[RESUMING[0]]),
            still=len(self.to_pause(hot_now)),
            asleep=sum(len(self._rows[row]) for row in ASLEEP),
            ending=len(self._ending) - len(self._stuck),
            stuck=len(self._stuck),
            cost=self.cost,
            tries=0 if self.refused else self.breaker.limit(now),
        )
