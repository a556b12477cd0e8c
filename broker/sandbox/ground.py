"""What the state directory has to be for slots and homes: one mount, short enough, ours to give away."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from broker.errors import Code, CortexError

MAX_SOCKET_PATH = 107
"""Bytes of a Unix socket's path without its closing NUL (unix(7))."""
_LONGEST_SOCKET = "gateway"


def sockets_fit(sock_dir: Path, state_dir: Path) -> None:
    """Raises ``BAD_CONFIG`` when a socket's path in ``sock_dir``, below ``state_dir``, would be too long."""
    longest = len(os.fsencode(sock_dir / _LONGEST_SOCKET))
    if longest > MAX_SOCKET_PATH:
        room = MAX_SOCKET_PATH - (longest - len(os.fsencode(state_dir)))
        raise CortexError(
            Code.BAD_CONFIG,
            f"state_dir is too long: {sock_dir / _LONGEST_SOCKET} is no possible socket path",
            hint=f"choose a broker.state_dir of at most {room} bytes",
        )


def prove(places: Sequence[Path], uid: int, give: Callable[[Path], None]) -> None:
    """Renames a directory that ``give`` gave to ``uid`` through all ``places`` and back. Raises ``CortexError``."""
    name = f".probe-{secrets.token_hex(4)}"
    at = places[0] / name
    with mapped("write to the state directory"):
        at.mkdir(mode=0o700)
    try:
        give(at)
        for place in (*places[1:], places[0]):
            os.rename(at, place / name)
            at = place / name
    except OSError as error:
        raise _proof_failed(error, at, uid) from error
    finally:
        with suppress(OSError):
            at.rmdir()


def _proof_failed(error: OSError, at: Path, uid: int) -> CortexError:
    if error.errno == errno.EXDEV:
        return CortexError(
            Code.BAD_CONFIG,
            f"a directory cannot be renamed from {at.parent} to its neighbours: they are different mounts",
            hint="put the whole of broker.state_dir on one mount (two bind mounts of one file system are two)",
            cause=error,
        )
    if error.errno in (errno.EPERM, errno.EACCES):
        return CortexError(
            Code.BAD_CONFIG,
            f"the broker may not give a directory to the sandbox's uid {uid}",
            hint="run as root, or with CAP_CHOWN, CAP_DAC_OVERRIDE and CAP_FOWNER, or set sandbox.uid to your own uid",
            cause=error,
        )
    return _error("prove the state directory", error)


def _error(doing: str, error: OSError) -> CortexError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CortexError(
            Code.DISK_FULL, f"no space left to {doing}", hint="free space under broker.state_dir", cause=error
        )
    return CortexError(
        Code.STORE_ERROR, f"could not {doing}", hint="look at owner and mode of broker.state_dir", cause=error
    )


@contextmanager
def mapped(doing: str) -> Iterator[None]:
    """``OSError`` within becomes ``CortexError``: ``DISK_FULL`` or ``STORE_ERROR``."""
    try:
        yield
    except OSError as error:
        raise _error(doing, error) from error
