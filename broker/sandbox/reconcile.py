"""After a start of the broker: what runs, what is on disk and what the store knows become one picture."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from broker.errors import CortexError
from broker.sandbox.driver import Found, SandboxDriver
from broker.sandbox.slots import Slot, Slots, home_key

log = structlog.get_logger(__name__)


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
    @property
    def agent(self) -> str: ...
    @property
    def boot(self) -> str: ...


@dataclass(frozen=True)
class Adopted:
    """A sandbox that goes on: make its ``SlotSockets`` and a ``Link(welcomed=True)`` for it."""

    record: SandboxRecord
    found: Found
    slot: Slot


@dataclass
class Outcome:
    """What ``reconcile`` did. ``removed``: refs; ``freed``: slots erased; ``quarantined``: slots whose home was
    set aside; ``failed``: slot → why it was left as it is; ``foreign``: slots of another driver, left alone."""

    adopted: list[Adopted] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    freed: list[str] = field(default_factory=list)
    quarantined: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    foreign: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """``adopt``: slot → what goes on; ``remove``: slot → sandboxes to remove before the slot is freed;
    ``free``: every slot to free, with or without a sandbox or a directory."""

    adopt: Mapping[str, tuple[SandboxRecord, Found]]
    remove: Mapping[str, Sequence[Found]]
    free: Sequence[str]
    foreign: Sequence[str]


def plan(
    driver: str,
    found: Sequence[Found],
    records: Sequence[SandboxRecord],
    owners: Mapping[str, str | None],
) -> Plan:
    """Decides, touching nothing. ``owners``: each slot on disk and what ``_inside`` says of it."""
    known = {record.slot: record for record in records if record.driver == driver}
    foreign = {record.slot for record in records if record.driver != driver}
    adopt: dict[str, tuple[SandboxRecord, Found]] = {}
    remove: dict[str, list[Found]] = {}
    for sandbox in found:
        record = known.get(sandbox.slot)
        if record is not None and sandbox.slot not in adopt and _goes_on(sandbox, record, owners):
            adopt[sandbox.slot] = (record, sandbox)
        else:
            remove.setdefault(sandbox.slot, []).append(sandbox)
    slots = {*known, *owners, *remove} - set(adopt) - foreign
    return Plan(adopt, remove, sorted(slots), sorted(foreign))


def _goes_on(sandbox: Found, record: SandboxRecord, owners: Mapping[str, str | None]) -> bool:
    return (
        sandbox.liveness in ("running", "paused")
        and record.incarnation == sandbox.incarnation
        and record.ref in ("", sandbox.ref)
        and record.welcomed
        and owners.get(sandbox.slot) == _home_of(record)
        and record.role in ("session", "warm")
    )


def _home_of(record: SandboxRecord) -> str | None:
    """The home that has to be in its slot; a warm sandbox has none."""
    return home_key(record.user, record.workspace) if record.role == "session" else None


async def reconcile(
    driver: SandboxDriver,
    slots: Slots,
    records: Sequence[SandboxRecord],
    forget: Callable[[str], Awaitable[None]],
) -> Outcome:
    """Adopts sandboxes that are ours and known, removes ours that are orphaned, touches nothing else.

    Adopted: runs or is paused, its record has the same slot and incarnation, it was welcomed, and the home
    that belongs there (none, when it is warm) is in its slot. All else of this driver's is removed, its home
    put to rest, its slot erased and ``forget(slot)`` called to delete its row. A row must be saved before its
    sandbox is created. Raises ``CortexError`` when the engine does not answer; nothing was touched then.
    """
    found = await driver.list()
    on_disk = {slot: _inside(slots, slot) for slot in slots.ids()}
    decided = plan(driver.name, found, records, on_disk)
    outcome = Outcome(foreign=list(decided.foreign))
    for slot, (record, sandbox) in decided.adopt.items():
        await _remove_all(driver, slot, decided.remove.get(slot, ()), outcome)
        _adopt(slots, record, sandbox, outcome)
    for slot in decided.foreign:
        await _remove_all(driver, slot, decided.remove.get(slot, ()), outcome)
    for slot in decided.free:
        if await _remove_all(driver, slot, decided.remove.get(slot, ()), outcome):
            await _free(slots, slot, forget, outcome)
    log.info(
        "reconciled",
        adopted=len(outcome.adopted),
        removed=len(outcome.removed),
        freed=len(outcome.freed),
        quarantined=len(outcome.quarantined),
        failed=len(outcome.failed),
        foreign=len(outcome.foreign),
    )
    return outcome


def _inside(slots: Slots, slot: str) -> str | None:
    """The key of the home inside, None for a blank one, "" when there is neither (a claim was cut off)."""
    place = slots.get(slot)
    return slots.owner(slot) if place is not None and place.home_dir.is_dir() else ""


def _adopt(slots: Slots, record: SandboxRecord, sandbox: Found, outcome: Outcome) -> None:
    place = slots.get(record.slot)
    if place is None:
        outcome.failed[record.slot] = "its slot is gone"
        return
    key = _home_of(record)
    if key is not None and slots.has_home(key):
        # The one in use is the real one; the other came from elsewhere.
        try:
            slots.quarantine_rest(key, "a home of the same key is in a running sandbox")
            outcome.quarantined.append(record.slot)
        except CortexError as error:
            # It goes on all the same: when the sandbox ends, the home in it is set aside instead.
            log.error("home_not_quarantined", slot=record.slot, error=str(error))
            outcome.failed[record.slot] = str(error)
    outcome.adopted.append(Adopted(record, sandbox, place))


async def _remove_all(driver: SandboxDriver, slot: str, found: Sequence[Found], outcome: Outcome) -> bool:
    """Whether no sandbox is in the slot any more. A home stays where a process may still write to it."""
    for sandbox in found:
        try:
            await driver.remove(sandbox.ref)
        except CortexError as error:
            log.error("orphan_not_removed", slot=slot, ref=sandbox.ref, error=str(error))
            outcome.failed[slot] = str(error)
            return False
        outcome.removed.append(sandbox.ref)
    return True


async def _free(slots: Slots, slot: str, forget: Callable[[str], Awaitable[None]], outcome: Outcome) -> None:
    try:
        key = slots.owner(slot)
        if key is not None and not slots.release_home(slot, key):
            outcome.quarantined.append(slot)
        await slots.remove(slot)
        await forget(slot)
    except CortexError as error:
        log.error("slot_not_freed", slot=slot, error=str(error))
        outcome.failed[slot] = str(error)
    else:
        outcome.freed.append(slot)
