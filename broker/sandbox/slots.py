"""Slots and homes on disk: who owns which directory, and the renames that move a home.

Under ``state_dir`` (0700, one file system)::

    slots/SLOT/sock   mounted read-only at /run/cortex; holds the three sockets
    slots/SLOT/vol    mounted at /vol; the broker's, the sandbox cannot write at its top
    slots/SLOT/vol/home   HOME of the sandbox, the sandbox uid's
    slots/SLOT/owner  a symbolic link whose text is the key of the home inside (one atomic call)
    homes/KEY/home    a user's home at rest
    homes/KEY/journal the broker's, never mounted
    packages/         shared MCP packages, mounted read-only
    quarantine/       homes found in two places
    trash/            what is being erased
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


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
    raise NotImplementedError


class Slots:
    """All slots and homes of one installation. Methods that are not async make a few short system calls.

    ``uid``: of the sandboxes. ``gid``: default the uid, or the broker's own gid when the uid is its own.
    Directories for the sandbox are given to it by chown where the uid is not the broker's own: that
    needs root or CAP_CHOWN, CAP_DAC_OVERRIDE and CAP_FOWNER.
    """

    def __init__(self, state_dir: Path, *, uid: int, gid: int | None = None) -> None:
        raise NotImplementedError

    packages_dir: Path
    uid: int
    gid: int

    def check(self) -> None:
        """Makes the directories and proves that all works: a rename from homes to slots and back, chown,
        socket paths of at most 107 bytes. Raises ``CortexError`` (``BAD_CONFIG`` or ``DISK_FULL``)."""
        raise NotImplementedError

    def new_id(self) -> str:
        """A slot id that is not in use."""
        raise NotImplementedError

    def create(self, slot: str) -> Slot:
        """Makes the slot with a blank home, nobody's yet. Raises ``CortexError``."""
        raise NotImplementedError

    def get(self, slot: str) -> Slot | None:
        """The slot if it is on disk (after a restart of the broker)."""
        raise NotImplementedError

    def ids(self) -> list[str]:
        """Ids of all slots on disk."""
        raise NotImplementedError

    def owner(self, slot: str) -> str | None:
        """The key of the home that is in the slot, or None."""
        raise NotImplementedError

    def adopt_home(self, slot: str, key: str) -> bool:
        """Puts the home of ``key`` into the slot: theirs by rename, or, where they have none, the slot's blank
        one becomes theirs. Returns whether they had one. Committed when it returns; repeating it is harmless.

        Raises ``CortexError``: ``SESSION_CONFLICT`` when the slot is another's or the home is in another slot.
        """
        raise NotImplementedError

    def release_home(self, slot: str, key: str) -> None:
        """Takes the home out of the slot to rest. Only for a sandbox known to be dead. Idempotent.

        What is no plain directory, or would overwrite a home at rest, is quarantined.
        """
        raise NotImplementedError

    def quarantine(self, slot: str, reason: str) -> Path | None:
        """Moves the slot's home aside for an operator to look at; returns where it is now."""
        raise NotImplementedError

    async def remove(self, slot: str) -> None:
        """Erases the slot and what is in it; a home must have been released before. Idempotent.

        It is out of sight at once; big trees are erased in a thread.
        """
        raise NotImplementedError

    def journal_dir(self, key: str) -> Path:
        """The journal directory of a home, made 0700 when it is missing."""
        raise NotImplementedError

    def has_home(self, key: str) -> bool:
        """Whether a home of that key is at rest."""
        raise NotImplementedError

    async def erase_home(self, key: str) -> None:
        """Erases home and journal of ``key`` for good. Raises ``SESSION_CONFLICT`` while it is in a slot."""
        raise NotImplementedError

    async def empty_trash(self) -> None:
        """Erases what an earlier run left half erased."""
        raise NotImplementedError
