"""After a start of the broker: what runs, what is on disk and what the store knows become one picture."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from broker.sandbox.driver import Found, SandboxDriver
from broker.sandbox.slots import Slot, Slots


class SandboxRecord(Protocol):
    """A row of the store (``broker.store.sessions.SandboxRow``)."""

    @property
    def slot(self) -> str: ...
    @property
    def incarnation(self) -> int: ...
    @property
    def driver(self) -> str: ...
    @property
    def ref(self) -> str: ...
    @property
    def user(self) -> str: ...
    @property
    def workspace(self) -> str: ...
    @property
    def role(self) -> str: ...
    @property
    def welcomed(self) -> bool: ...


@dataclass(frozen=True)
class Adopted:
    """A sandbox that goes on: make its ``SlotSockets`` and a ``Link(welcomed=True)`` for it."""

    record: SandboxRecord
    found: Found
    slot: Slot


@dataclass
class Outcome:
    """What ``reconcile`` did. ``failed``: slot → why it was left as it is; ``foreign``: slots of another driver."""

    adopted: list[Adopted] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    freed: list[str] = field(default_factory=list)
    quarantined: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    foreign: list[str] = field(default_factory=list)


async def reconcile(
    driver: SandboxDriver,
    slots: Slots,
    records: Sequence[SandboxRecord],
    forget: Callable[[str], Awaitable[None]],
) -> Outcome:
    """Adopts sandboxes that are ours and known, removes ours that are orphaned, touches nothing else.

    Adopted: runs or is paused, its record has the same slot and incarnation, it was welcomed, and its
    home is in its slot. All else of this driver's is removed, its home put to rest, its slot erased and
    ``forget(slot)`` called to delete its row. A row must be saved before its sandbox is created.
    Raises ``CortexError`` when the engine does not answer; nothing was touched then.
    """
    raise NotImplementedError
