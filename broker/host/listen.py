"""Listening sockets by address: ``host:port``, ``unix:PATH`` or ``systemd:NAME``."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from broker.errors import Code, CortexError

BACKLOG = 1024
_SO_PASSRIGHTS = 83


def refuse_descriptors(listener: socket.socket) -> None:
    """Lets nobody send descriptors to what the Unix socket ``listener`` accepts (SO_PASSRIGHTS, Linux 6.16).

    One that nobody asked for is closed by the kernel in whoever reads, and the last close of a socket may block
    for as long as its owner likes (socket(7), SO_LINGER). Older kernels let them through.
    """
    with suppress(OSError):
        listener.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)


def listen(address: str, key: str, passed: Mapping[str, list[socket.socket]]) -> list[socket.socket]:
    """The bound sockets of ``address``. ``key`` names the setting in errors; ``passed``: systemd's, by name.

    Raises ``CortexError`` (``BAD_CONFIG``) that says what is in the way.
    """
    if address.startswith("systemd:"):
        name = address.removeprefix("systemd:")
        if not passed.get(name):
            raise _failed(key, address, "systemd passed no socket of that name", "start it through cortex.socket")
        return passed[name]
    if address.startswith("unix:"):
        return [_unix(Path(address.removeprefix("unix:")), key)]
    host, _, port = address.rpartition(":")
    return [_tcp(host.strip("[]"), int(port), key, address)]


def url(sockets: list[socket.socket], scheme: str) -> str:
    """``scheme://host:port`` of the first socket; for a Unix socket its path."""
    sock = sockets[0]
    if sock.family == socket.AF_UNIX:
        return f"unix:{sock.getsockname()}"
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def require_local(sockets: list[socket.socket], key: str) -> None:
    """Raises ``BAD_CONFIG`` unless only this host reaches ``sockets``: Unix ones, or on a loopback address."""
    for sock in sockets:
        if sock.family != socket.AF_UNIX and not ipaddress.ip_address(sock.getsockname()[0]).is_loopback:
            raise CortexError(
                Code.BAD_CONFIG,
                f"{key} is open to other hosts, and agents run without isolation",
                hint="install bubblewrap or use the docker driver; without isolation listen on 127.0.0.1 only",
            )


def _tcp(host: str, port: int, key: str, address: str) -> socket.socket:
    try:
        family, kind, proto, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, proto)
    except OSError as error:
        raise _failed(key, address, str(error), "name a local address") from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setblocking(False)
        sock.bind(where)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        hint = (
            "stop what listens there, or choose another port" if error.errno == errno.EADDRINUSE else "choose another"
        )
        raise _failed(key, address, str(error), hint) from error
    return sock


def _unix(path: Path, key: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if path.exists() and not stat.S_ISSOCK(path.lstat().st_mode):
            raise OSError(errno.EEXIST, "the path is there and is no socket")
        if _served(path):
            raise OSError(errno.EADDRINUSE, "another process listens there")
        path.unlink(missing_ok=True)
        before = os.umask(0o117)
        try:
            sock.bind(str(path))
        finally:
            os.umask(before)
        sock.setblocking(False)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise _failed(key, f"unix:{path}", str(error), "choose another path, 107 bytes at most") from error
    return sock


def _served(path: Path) -> bool:
    """Whether somebody listens at ``path``; what a process that died left behind refuses."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except BlockingIOError:
            return True
        except OSError:
            return False
        return True


def _failed(key: str, address: str, cause: str, hint: str) -> CortexError:
    return CortexError(Code.BAD_CONFIG, f"{key} cannot listen on {address}", cause=cause, hint=hint)
