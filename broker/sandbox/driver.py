"""The driver port: what the broker asks of whatever runs sandboxes.

Drivers know nothing of sessions. They run one agent server in a box that sees the slot's sockets
at ``/run/cortex`` (read-only), the slot's volume at ``/vol`` and the shared packages at
``/opt/cortex/packages`` (read-only), and nothing else of the host. Of its own it has a small tmpfs
for credential files, which ends with it. Every driver passes the suite in
``tests/integration/sandbox/test_driver_conformance.py``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

SOCK_DIR = "/run/cortex"
"""Where a sandbox sees its slot's sockets."""
VOL_DIR = "/vol"
HOME_DIR = "/vol/home"
PACKAGES_DIR = "/opt/cortex/packages"
CREDENTIALS_DIR = "/run/cortex-credentials"
"""Where an isolated sandbox has its tmpfs for credential files: 0700, the sandbox's uid, no set-uid, no devices."""
CREDENTIALS_BYTES = 2**20
GATEWAY_PORT = 4180
"""Loopback port of the gateway forwarder in a sandbox that has its own network namespace."""
EGRESS_PORT = 4181

Liveness = Literal["created", "running", "paused", "exited", "gone"]


@dataclass(frozen=True)
class SandboxSpec:
    """What to run. ``slot``: short id; ``incarnation``: number of this start; paths are the host's.

    ``commands`` are the operator's words of the agent's argv: the process driver shows what they name.
    Nothing that a user wrote may be among them.
    """

    slot: str
    incarnation: int
    sock_dir: Path
    vol_dir: Path
    packages_dir: Path
    uid: int
    role: Literal["session", "builder"] = "session"
    commands: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    memory_bytes: int | None = None
    cpus: float | None = None
    pids: int | None = None
    gid: int | None = None
    """Group of the sandbox; None: the broker's own where ``uid`` is its own, else equal to ``uid``."""

    @property
    def group(self) -> int:
        """The group id it runs with."""
        if self.gid is not None:
            return self.gid
        return os.getgid() if self.uid == os.getuid() else self.uid


@dataclass(frozen=True)
class Found:
    """A sandbox that ``list`` found: the driver's ``ref``, its slot and how it is. ``image``: id of what it was made
    from, as ``prepare_image`` gives it; "" where there is none."""

    ref: str
    slot: str
    incarnation: int
    liveness: Liveness
    image: str = ""


@dataclass(frozen=True)
class Exit:
    """How a sandbox ended. ``code`` None when unknown; ``tail``: its last words, at most 4 KiB."""

    code: int | None
    oom: bool = False
    tail: str = ""


class SandboxDriver(Protocol):
    """Every call has a deadline of its own and raises ``CortexError`` (engine down, timeout, image missing)."""

    name: str
    isolated: bool
    """Sandboxes have their own network namespace, so loopback ports are fixed."""

    async def open(self) -> None:
        """Connects and checks that sandboxes can be made; raises with a hint otherwise."""

    async def close(self) -> None:
        """Lets go of the engine; sandboxes go on."""

    async def prepare_image(self) -> str:
        """Sees that what sandboxes are made from is there, and fetches it where that can be done.

        Returns its id, which is another when its content is; "" where there is nothing to fetch.
        """

    async def create(self, spec: SandboxSpec) -> str:
        """Makes a sandbox and returns its ``ref``. Nothing runs yet. All or nothing."""

    async def start(self, ref: str) -> None:
        """Starts it (again)."""

    async def pause(self, ref: str) -> None:
        """Stops its processes from being scheduled."""

    async def resume(self, ref: str) -> None:
        """Undoes ``pause``."""

    async def stop(self, ref: str, grace_s: float) -> None:
        """SIGTERM, after ``grace_s`` SIGKILL; returns when it is known to be dead. Idempotent."""

    async def remove(self, ref: str) -> None:
        """Kills it if need be and frees all of it. Returns when no process of it lives. Idempotent."""

    async def wait(self, ref: str) -> Exit:
        """Returns when it has ended; safe to cancel."""

    async def inspect(self, ref: str) -> Liveness:
        """How it is now."""

    def credentials_dir(self, slot: str, incarnation: int) -> str:
        """Where that sandbox keeps credential files, as it sees it; "" when it has no place for them."""

    async def memory(self, ref: str) -> int:
        """Bytes that all its processes take now; 0 where that cannot be seen."""

    async def list(self) -> list[Found]:
        """All sandboxes of this installation, whatever their state; nobody else's."""
