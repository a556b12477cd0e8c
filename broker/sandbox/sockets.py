"""The listeners in a slot's socket directory. The sandbox sees the directory read-only."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path

from broker.errors import Code, CortexError
from broker.host.listen import refuse_descriptors
from broker.sandbox.slots import Slot

BACKLOG = 64


class SlotSockets:
    """The three listeners of a slot: ``agent`` (the broker's), ``gateway`` and ``egress`` (for the gateway process).

    Files 0660 with the sandbox's gid; what an earlier run left is replaced atomically. They outlive a
    ``Link``: a new incarnation in the slot uses the same ones.
    """

    def __init__(self, slot: Slot, *, gid: int) -> None:
        self.slot = slot
        self._gid = gid
        self._listeners: dict[str, socket.socket] = {}

    def open(self) -> None:
        """Binds and listens. Raises ``CortexError``."""
        try:
            for name in ("agent", "gateway", "egress"):
                self._listeners[name] = _listen(self.slot.sock_dir / name, self._gid)
        except OSError as error:
            self.close()
            raise CortexError(
                Code.STORE_ERROR,
                f"could not listen in slot {self.slot.id}",
                hint="look at owner, mode and free space of broker.state_dir, and at the limit of open files",
                cause=error,
            ) from error

    @property
    def agent(self) -> socket.socket:
        """The listener that the agent server dials; non-blocking."""
        return self._listeners["agent"]

    @property
    def fds(self) -> tuple[int, int]:
        """Descriptors of the gateway and the egress listener, still owned here."""
        return self._listeners["gateway"].fileno(), self._listeners["egress"].fileno()

    def close(self) -> None:
        """Closes the listeners and takes their files away. Idempotent. Close the slot's ``Link`` before."""
        for name, listener in self._listeners.items():
            listener.close()
            with suppress(OSError):
                os.unlink(self.slot.sock_dir / name)
        self._listeners.clear()


def _listen(path: Path, gid: int) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    temporary = path.with_name(".new")
    try:
        listener.setblocking(False)
        refuse_descriptors(listener)
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        listener.bind(os.fspath(temporary))
        if gid != os.getegid():
            os.chown(temporary, -1, gid)
        os.chmod(temporary, 0o660)
        listener.listen(BACKLOG)
        # Only now under its name: whoever finds the socket can use it.
        os.rename(temporary, path)
    except OSError:
        listener.close()
        raise
    return listener
