"""Slots and homes on disk: who owns which directory, and the renames that move a home.

Under ``state_dir`` (0700, one file system)::

    slots/SLOT/sock   mounted read-only at /run/cortex; holds the three sockets
    slots/SLOT/vol    mounted at /vol; the broker's, the sandbox cannot write at its top
    slots/SLOT/vol/home   HOME of the sandbox, the sandbox uid's
    slots/SLOT/owner.KEY  says whose home is inside; "owner." as long as it is nobody's
    homes/KEY/home    a user's home at rest
    homes/KEY/journal the broker's, never mounted
    packages/         shared MCP packages, mounted read-only
    quarantine/       homes found in two places
    trash/            what is being erased
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import secrets
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import structlog

from broker.errors import Code, CortexError
from broker.sandbox.ground import mapped, prove, sockets_fit
from broker.sandbox.trash import discard, erase

log = structlog.get_logger(__name__)

_ERASERS = 2
"""Trees erased at once: one may take minutes, and the threads are for everybody."""
_SLOT = re.compile(r"[a-z0-9]{1,16}")
_OWNER = "owner."
_KEY = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True)
class Slot:
    """One slot's paths on the host. ``id`` is 8 hex digits."""

    id: str
    root: Path

    @property
    def sock_dir(self) -> Path:
        """What the sandbox sees at /run/cortex."""
        return self.root / "sock"

    @property
    def vol_dir(self) -> Path:
        """What the sandbox sees at /vol."""
        return self.root / "vol"

    @property
    def home_dir(self) -> Path:
        """HOME; absent only while a home is on its way in or out."""
        return self.vol_dir / "home"


def home_key(user: str, workspace: str) -> str:
    """The directory name of the home of ``user`` in ``workspace``: 32 hex digits of SHA-256."""
    # "/" is in neither name, so two different pairs never make the same text.
    return hashlib.sha256(f"{user}/{workspace}".encode()).hexdigest()[:32]


class Slots:
    """All slots and homes of one installation. Methods that are not async make a few short system calls.

    ``uid``: of the sandboxes. ``gid``: default the uid, or the broker's own gid when the uid is its own.
    Directories for the sandbox are given to it by chown where the uid is not the broker's own: that
    needs root or CAP_CHOWN, CAP_DAC_OVERRIDE and CAP_FOWNER.
    """

    def __init__(self, state_dir: Path, *, uid: int, gid: int | None = None) -> None:
        self.uid = uid
        own = uid == os.geteuid()
        self.gid = gid if gid is not None else (os.getegid() if own else uid)
        self._state_dir = state_dir
        self._slots = state_dir / "slots"
        self._homes = state_dir / "homes"
        self._trash = state_dir / "trash"
        self._quarantine = state_dir / "quarantine"
        self.packages_dir = state_dir / "packages"
        self._owners: dict[str, str] | None = None
        self._erasing = asyncio.Semaphore(_ERASERS)

    def check(self) -> None:
        """Makes the directories and proves that all works: a rename from homes to slots and back, chown,
        socket paths of at most 107 bytes. Raises ``CortexError`` (``BAD_CONFIG`` or ``DISK_FULL``)."""
        sockets_fit(self._slots / ("0" * 8) / "sock", self._state_dir)
        places = (self._homes, self._slots, self._trash, self._quarantine)
        with mapped("prepare the state directory"):
            for path in (self._state_dir, *places):
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.packages_dir.mkdir(mode=0o755, exist_ok=True)
            os.chmod(self.packages_dir, 0o755)
        prove((*places, self.packages_dir), self.uid, lambda path: self._give(path, 0o700))

    def _give(self, path: Path, mode: int) -> None:
        """Makes the sandbox the owner."""
        os.chmod(path, mode)
        if self.uid != os.geteuid() or self.gid != os.getegid():
            os.chown(path, self.uid, self.gid)

    def _share(self, path: Path, mode: int) -> None:
        """Lets the sandbox's group in; the owner stays."""
        path.mkdir(mode=0o700)
        os.chmod(path, mode)
        if self.gid != os.getegid():
            os.chown(path, -1, self.gid)

    def new_id(self) -> str:
        """A slot id that is not in use."""
        while True:
            slot = secrets.token_hex(4)
            if not (self._slots / slot).exists():
                return slot

    def create(self, slot: str) -> Slot:
        """Makes the slot with a blank home, nobody's yet. Raises ``CortexError``."""
        made = self._at(slot)
        with mapped("make a slot"):
            made.root.mkdir(mode=0o700)
            try:
                (made.root / _OWNER).touch(mode=0o600)
                self._share(made.sock_dir, 0o750)
                self._share(made.vol_dir, 0o750)
                made.home_dir.mkdir(mode=0o700)
                self._give(made.home_dir, 0o700)
            except OSError:
                with suppress(OSError):
                    discard(made.root, self._trash)
                raise
        return made

    def _at(self, slot: str) -> Slot:
        if not _SLOT.fullmatch(slot):
            raise ValueError(f"not a slot id: {slot!r}")
        return Slot(slot, self._slots / slot)

    def _home_at_rest(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise ValueError(f"not the key of a home: {key!r}")
        return self._homes / key / "home"

    def get(self, slot: str) -> Slot | None:
        """The slot if it is on disk (after a restart of the broker)."""
        found = self._at(slot)
        return found if found.root.is_dir() else None

    def ids(self) -> list[str]:
        """Ids of all slots on disk."""
        with mapped("list slots"), os.scandir(self._slots) as found:
            return sorted(one.name for one in found if _SLOT.fullmatch(one.name) and one.is_dir(follow_symlinks=False))

    def owners(self) -> dict[str, str]:
        """Slot → key of the home that is in it."""
        if self._owners is None:
            self._owners = {}
            for slot in self.ids():
                for name in os.listdir(self._slots / slot):
                    if name.startswith(_OWNER) and name != _OWNER:
                        self._owners[slot] = name.removeprefix(_OWNER)
        return self._owners

    def owner(self, slot: str) -> str | None:
        """The key of the home that is in the slot, or None."""
        return self.owners().get(slot)

    def adopt_home(self, slot: str, key: str) -> bool:
        """Puts the home of ``key`` into the slot: theirs by rename, or, where they have none, the slot's blank
        one becomes theirs. Returns whether they had one. Committed when it returns; repeating it is harmless.

        Raises ``CortexError``: ``SESSION_CONFLICT`` when the slot is another's or the home is in another slot.
        """
        place, rest = self._at(slot), self._home_at_rest(key)
        self._must_be_free(slot, key)
        with mapped("move a home into its slot"):
            if not _is_dir(rest):
                self._must_have_blank(place)
                self._set_owner(slot, key)
                return False
            if self.owner(slot) == key and _exists(place.home_dir):
                self.quarantine(slot, "the home is at rest and in its slot")
            elif _exists(place.home_dir):
                os.rename(place.home_dir, place.root / f"blank.{secrets.token_hex(4)}")
            # The owner first: after a crash in between the home is at rest still, and in one place.
            self._set_owner(slot, key)
            _move(rest, place.home_dir)
        return True

    def _must_be_free(self, slot: str, key: str) -> None:
        holder = next((other for other, held in self.owners().items() if held == key and other != slot), None)
        if holder is not None:
            raise CortexError(
                Code.SESSION_CONFLICT,
                f"the home is in slot {holder}",
                hint="its sandbox has to end first; after a change of sandbox.driver, change back and stop the session",
            )
        if self.owner(slot) not in (None, key):
            raise CortexError(
                Code.SESSION_CONFLICT,
                f"slot {slot} holds another's home",
                hint="a slot is claimed once; take a new one",
            )

    def _must_have_blank(self, place: Slot) -> None:
        if not _is_dir(place.home_dir):
            raise CortexError(
                Code.SESSION_CONFLICT,
                f"slot {place.id} has no blank home any more",
                hint="a slot is claimed once; take a new one",
            )

    def _set_owner(self, slot: str, key: str) -> None:
        # Renames only, on the way of a claim: making or freeing an inode costs a hundred times as much.
        if self.owner(slot) != key:
            os.rename(self._slots / slot / _OWNER, self._slots / slot / f"{_OWNER}{key}")
            self.owners()[slot] = key

    def _clear_owner(self, slot: str) -> None:
        key = self.owners().pop(slot, None)
        if key is not None:
            os.rename(self._slots / slot / f"{_OWNER}{key}", self._slots / slot / _OWNER)

    def release_home(self, slot: str, key: str) -> bool:
        """Takes the home out of the slot to rest. Only for a sandbox known to be dead. Idempotent.

        What is no plain directory, or is a second home of that key, is quarantined: False then.
        """
        place, rest = self._at(slot), self._home_at_rest(key)
        owner = self.owner(slot)
        if owner is None:
            return True
        if owner != key:
            raise CortexError(Code.SESSION_CONFLICT, f"slot {slot} holds another's home", hint="release the right home")
        with mapped("take a home out of its slot"):
            if _exists(place.home_dir):
                reason = self._why_not_rest(slot, key)
                if reason:
                    self.quarantine(slot, reason)
                    return False
                rest.parent.mkdir(mode=0o700, exist_ok=True)
                _move(place.home_dir, rest)
            self._clear_owner(slot)
        return True

    def _why_not_rest(self, slot: str, key: str) -> str:
        if not _is_dir(self._at(slot).home_dir):
            return "the home is no directory"
        if _exists(self._home_at_rest(key)):
            return "a home of the same key is at rest"
        if any(other != slot and held == key for other, held in self.owners().items()):
            return "a home of the same key is in another slot"
        return ""

    def quarantine(self, slot: str, reason: str) -> Path | None:
        """Moves the slot's home aside for an operator to look at; returns where it is now."""
        return self._set_aside(self._at(slot).home_dir, self.owner(slot) or slot, reason, slot)

    def quarantine_rest(self, key: str, reason: str) -> Path | None:
        """The same for a home at rest."""
        return self._set_aside(self._home_at_rest(key), key, reason, None)

    def _set_aside(self, home: Path, name: str, reason: str, slot: str | None) -> Path | None:
        target = self._quarantine / f"{name}.{secrets.token_hex(4)}"
        with mapped("quarantine a home"):
            moved = _exists(home)
            if moved:
                _move(home, target)
            if slot is not None:
                self._clear_owner(slot)
        if not moved:
            return None
        log.error("home_quarantined", slot=slot, reason=reason, path=str(target))
        return target

    async def remove(self, slot: str) -> None:
        """Erases the slot and what is in it; a home must have been released before. Idempotent.

        It is out of sight at once; big trees are erased in a thread. Raises ``SESSION_CONFLICT`` while
        somebody's home is in it.
        """
        place = self._at(slot)
        if self.owner(slot) is not None and _exists(place.home_dir):
            raise CortexError(
                Code.SESSION_CONFLICT, f"slot {slot} holds a user's home", hint="release the home before its slot"
            )
        with mapped("remove a slot"):
            name = discard(place.root, self._trash)
        self.owners().pop(slot, None)
        await self._erase(name)

    async def _erase(self, name: str | None) -> None:
        if name is None:
            return
        try:
            async with self._erasing:
                await asyncio.to_thread(erase, self._trash, name)
        except OSError as error:
            # It stays in the trash, which the next start empties again.
            log.error("erase_failed", path=str(self._trash / name), error=str(error))

    def journal_dir(self, key: str) -> Path:
        """The journal directory of a home, made 0700 when it is missing."""
        path = self._home_at_rest(key).parent / "journal"
        with mapped("make a journal directory"):
            path.parent.mkdir(mode=0o700, exist_ok=True)
            path.mkdir(mode=0o700, exist_ok=True)
        return path

    def has_home(self, key: str) -> bool:
        """Whether a home of that key is at rest."""
        return _is_dir(self._home_at_rest(key))

    async def erase_home(self, key: str) -> None:
        """Erases home and journal of ``key`` for good. Raises ``SESSION_CONFLICT`` while it is in a slot."""
        path = self._home_at_rest(key).parent
        if key in self.owners().values():
            raise CortexError(Code.SESSION_CONFLICT, "the home is in a slot", hint="stop its session first")
        with mapped("erase a home"):
            name = discard(path, self._trash)
        await self._erase(name)

    async def empty_trash(self) -> None:
        """Erases what an earlier run left half erased."""
        with mapped("empty the trash"):
            names = os.listdir(self._trash)
        for name in names:
            await self._erase(name)


def _is_dir(path: Path) -> bool:
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except FileNotFoundError:
        return False


def _move(source: Path, target: Path) -> None:
    """Renames a directory that its owner may have closed; moving one writes its ".."."""
    try:
        os.rename(source, target)
    except PermissionError:
        if not _is_dir(source):
            raise
        os.chmod(source, 0o700)
        os.rename(source, target)


def _exists(path: Path) -> bool:
    return os.path.lexists(path)
