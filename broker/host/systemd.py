"""systemd's side of a service: readiness, watchdog and inherited sockets, without a library.

sd_notify(3): datagrams of ``KEY=value`` lines to $NOTIFY_SOCKET. sd_listen_fds(3): sockets from
descriptor 3 on, named by $LISTEN_FDNAMES. Everything is a no-op where systemd is not.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable, MutableMapping

import structlog

from broker.errors import Code, CortexError

FIRST_FD = 3

log = structlog.get_logger(__name__)


class Notifier:
    """Speaks to the service manager. Takes its variables out of ``env``, so that no child speaks for us."""

    def __init__(self, env: MutableMapping[str, str] = os.environ) -> None:
        self._address = env.pop("NOTIFY_SOCKET", "")
        usec, pid = env.pop("WATCHDOG_USEC", ""), env.pop("WATCHDOG_PID", "")
        ours = not pid or pid == str(os.getpid())
        self.watchdog_s: float | None = int(usec) / 1e6 if usec.isdigit() and int(usec) > 0 and ours else None
        """Silence after which the manager kills us, seconds; None without a watchdog."""

    @property
    def present(self) -> bool:
        """A service manager listens."""
        return bool(self._address)

    def ready(self, status: str = "") -> None:
        """Started, or reloaded."""
        self._send("READY=1", status)

    def reloading(self) -> None:
        """A reload has begun; ``ready`` ends it."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self, status: str = "") -> None:
        """The shutdown has begun."""
        self._send("STOPPING=1", status)

    def status(self, text: str) -> None:
        """One line for ``systemctl status``."""
        self._send("", text)

    def alive(self) -> None:
        """Feeds the watchdog."""
        self._send("WATCHDOG=1")

    def _send(self, state: str, status: str = "") -> None:
        if not self._address:
            return
        lines = [state] if state else []
        if status:
            lines.append("STATUS=" + " ".join(status.split()))
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.setblocking(False)
                sock.sendto("\n".join(lines).encode(), address)
        except OSError as error:
            log.warning("notify_failed", cause=str(error))


async def feed_watchdog(notifier: Notifier, healthy: Callable[[], bool]) -> None:
    """Feeds the watchdog twice an interval for as long as ``healthy`` says so; returns when there is none."""
    if notifier.watchdog_s is None or not notifier.present:
        return
    while True:
        if healthy():
            notifier.alive()
        else:
            log.error("unhealthy", effect="the watchdog is not fed")
        await asyncio.sleep(notifier.watchdog_s / 2)


def listen_fds(env: MutableMapping[str, str] = os.environ, first: int = FIRST_FD) -> dict[str, list[socket.socket]]:
    """The sockets that systemd passed in, by name ("unknown" without one), not inheritable, not blocking.

    Empty when they are meant for another process. The variables are taken out of ``env``.
    """
    pid, count, names = (env.pop(f"LISTEN_{part}", "") for part in ("PID", "FDS", "FDNAMES"))
    if pid != str(os.getpid()) or not count.isdigit():
        return {}
    found: dict[str, list[socket.socket]] = {}
    labels = names.split(":")
    for index in range(int(count)):
        fd = first + index
        os.set_inheritable(fd, False)
        try:
            sock = socket.socket(fileno=fd)
        except OSError as error:
            raise CortexError(
                Code.BAD_CONFIG,
                f"descriptor {fd} from systemd is not a socket",
                cause=error,
                hint="check cortex.socket",
            ) from error
        sock.setblocking(False)
        name = labels[index] if index < len(labels) and labels[index] else "unknown"
        found.setdefault(name, []).append(sock)
    return found
