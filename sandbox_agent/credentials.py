"""Credential files of the agent: their content is on the sandbox's tmpfs, the home holds links to it.

So a home at rest, or one whose sandbox was killed, has no credential in it. What the agent writes, into
the file or by renaming another over the link, is moved to the tmpfs and told to the broker.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress

from sandbox_agent import homefiles
from sandbox_agent.homefiles import UnsafePath
from sandbox_agent.lineage import Lineage
from sandbox_agent.tasks import log
from sandbox_agent.watch import Watch
from sandbox_agent.wire.messages import MAX_CREDENTIAL_FILE, Refreshed

SEND_EVERY_S = 1.0
"""What changes more often is told later; the last state is always told."""
LOOK_EVERY_S = 2.0
"""Where the host has no more watches (``fs.inotify.max_user_instances`` counts for all sandboxes together)."""

HALF = "half"
"""Stands for the digest of what is no credential file, or not yet."""


class _File:
    """One file: ``path`` as it was bound, ``name`` in the tmpfs, ``target`` of the link."""

    def __init__(self, key: str, directory: str) -> None:
        self.path = key
        self.parts = key.split("/")
        self.name = f"{_digest(os.fsencode(key))[:12]}-{self.parts[-1][-40:]}"
        self.target = os.path.join(directory, self.name)
        self.lineage = Lineage()


class CredentialFiles:
    """``directory``: the tmpfs, 0700; ``send`` tells the broker, or drops it while the broker is away."""

    def __init__(self, *, home: str, directory: str, send: Callable[[Refreshed], None]) -> None:
        self._home = home
        self.directory = directory
        self._send = send
        self._fd = -1
        self._files: dict[str, _File] = {}
        self._watch = Watch(self._look)
        self._timer: asyncio.TimerHandle | None = None
        self._quiet_until = 0.0
        self._blind = False

    # -- from the broker ------------------------------------------------------------------------

    def put(self, files: Sequence[tuple[str, bytes]]) -> None:
        """These (path, content) and no others. A file that the agent has changed since it was given what comes
        now, or something older, stays as it is. Raises ``UnsafePath`` or ``OSError``."""
        if not files and not self._files:
            return
        if self._fd < 0:
            self._fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        wanted = {"/".join(homefiles.parts_below(self._home, path)): (path, content) for path, content in files}
        for key, (path, content) in wanted.items():
            self._put(key, path, content)
        for key in self._files.keys() - wanted.keys():
            self._drop(self._files.pop(key))
        self._look()

    def relink(self) -> None:
        """The home is another one: links into it. Raises ``UnsafePath`` or ``OSError``."""
        for file in self._files.values():
            self._link(file)
        self._look()

    def reconnected(self) -> None:
        """The broker is back: it is told again what it has not answered with a bind."""
        for file in self._files.values():
            file.lineage.forget_sent()
        self._look()

    def close(self) -> None:
        """The agent has ended: its last word is told, and nothing is left in the home. Idempotent."""
        self._quiet_until = 0.0
        self._look()
        self._watch.close()
        if self._timer is not None:
            self._timer.cancel()
        for key in list(self._files):
            self._drop(self._files.pop(key))
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _put(self, key: str, path: str, content: bytes) -> None:
        file = self._files.get(key)
        if file is not None:
            with suppress(FileNotFoundError, UnsafePath):
                self._absorb(file)
        else:
            file = self._files[key] = _File(key, self.directory)
        file.path = path
        offered, current = _digest(content), self._current(file)[1]
        if offered != current and not file.lineage.outdates(offered, current):
            homefiles.write_in(self._fd, file.name, content)
            current = offered
        file.lineage.bound(offered, current)
        self._link(file)

    def _link(self, file: _File) -> None:
        with homefiles.place(self._home, "/".join(file.parts), make=True) as (directory, name):
            if homefiles.target_of(directory, name) != file.target:
                homefiles.link_in(directory, name, file.target)

    def _drop(self, file: _File) -> None:
        """Takes link and content away, and a file in the link's place; a link of the user's own stays."""
        with suppress(OSError, UnsafePath), homefiles.place(self._home, "/".join(file.parts), make=False) as at:
            directory, name = at
            with homefiles.regular(directory, name) as own:
                ours = own is not None or homefiles.target_of(directory, name) == file.target
            if ours:
                os.unlink(name, dir_fd=directory)
        with suppress(OSError):
            os.unlink(file.name, dir_fd=self._fd)

    # -- from the agent -------------------------------------------------------------------------

    def _look(self) -> None:
        """Takes in what the agent has changed. The rest waits for its turn, or for the end of a write."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        loop = asyncio.get_running_loop()
        wait, sent = 0.0 if self._watched() else LOOK_EVERY_S, False
        for file in self._files.values():
            with suppress(OSError, UnsafePath):
                self._absorb(file)
            content, digest = self._current(file)
            if content is None or not file.lineage.news(digest):
                continue
            if loop.time() < self._quiet_until:
                wait = self._quiet_until - loop.time()
                continue
            self._send(Refreshed(file.path, content, file.lineage.known))
            file.lineage.sent(digest)
            sent = True
        if sent:
            self._quiet_until = loop.time() + SEND_EVERY_S
        if wait:
            self._timer = loop.call_later(wait, self._look)

    def _watched(self) -> bool:
        wanted: dict[str, frozenset[str]] = {}
        for file in self._files.values():
            wanted[self.directory] = wanted.get(self.directory, frozenset()) | {file.name}
            for depth, part in enumerate(file.parts):
                above = os.path.join(self._home, *file.parts[:depth])
                wanted[above] = wanted.get(above, frozenset()) | {part}
        try:
            self._watch.set(wanted)
        except OSError as error:
            if not self._blind:
                log.warning("credential files are looked at every %g s, not watched: %s", LOOK_EVERY_S, error)
            self._blind = True
            return False
        self._blind = False
        return True

    def _absorb(self, file: _File) -> None:
        """Moves what the agent has put in the place of the link to the tmpfs, whole, and puts the link back."""
        with (
            homefiles.place(self._home, "/".join(file.parts), make=False) as (directory, name),
            homefiles.regular(directory, name) as own,
        ):
            if own is None:
                return
            content = _whole(own)
            if content is None:
                return
            homefiles.write_in(self._fd, file.name, content)
            if not os.path.samestat(os.fstat(own), os.stat(name, dir_fd=directory, follow_symlinks=False)):
                return  # replaced once more; that is an event too
            homefiles.link_in(directory, name, file.target)
            last = _whole(own)
            if last is not None and last != content:
                homefiles.write_in(self._fd, file.name, last)

    def _current(self, file: _File) -> tuple[bytes | None, str]:
        """What the tmpfs holds, and its digest: "" for nothing, ``HALF`` for what cannot be used (yet)."""
        with homefiles.regular(self._fd, file.name) as own:
            content = None if own is None else _whole(own)
            return content, "" if own is None else HALF if content is None else _digest(content)


def _whole(file: int) -> bytes | None:
    """Its content if that is a JSON object with something in it, within the limit: not what is half written."""
    try:
        content = os.pread(file, MAX_CREDENTIAL_FILE + 1, 0)
        held = json.loads(content) if len(content) <= MAX_CREDENTIAL_FILE else None
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(held, dict) and held else None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
