"""Looks around inside a sandbox and prints what it finds as JSON. Standard library only.

argv, each a JSON list: the words to look for (spelt backwards, or their own command line would hold
them), host:port pairs to dial, host paths that must not be there.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from collections.abc import Iterator
from typing import Any

MAX_FILE = 2**20
SKIPPED = ("/proc", "/sys", "/usr", "/lib", "/lib64", "/bin", "/sbin", sys.base_prefix)
MINE = os.getpid()


def read(path: str, size: int = MAX_FILE) -> bytes | None:
    """The file's beginning; None when it cannot be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return os.read(fd, size)
    except OSError:
        return None
    finally:
        os.close(fd)


def files() -> Iterator[str]:
    """Every regular file that is not the system's."""
    for top, directories, names in os.walk("/"):
        directories[:] = [
            name for name in directories if os.path.join(top, name) not in SKIPPED and name != "site-packages"
        ]
        for name in names:
            path = os.path.join(top, name)
            if os.path.isfile(path):
                yield path


def processes() -> dict[str, dict[str, Any]]:
    """What can be read of every process but this one."""
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        if int(pid) == MINE:
            continue
        fds: list[str] = []
        with contextlib.suppress(OSError):
            for fd in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    fds.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
        found[pid] = {
            "command": (read(f"/proc/{pid}/cmdline") or b"").replace(b"\0", b" ").decode(errors="replace"),
            "environ": (read(f"/proc/{pid}/environ") or b"").decode(errors="replace"),
            "memory": read(f"/proc/{pid}/mem", 0) is not None,
            "fds": fds,
        }
    return found


def connect(place: str) -> str:
    """How dialling it ends: ``connected`` or the error's name."""
    host, _, port = place.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), 2):
            return "connected"
    except OSError as error:
        return type(error).__name__ + f" {error.errno}"


def opened(family: int, kind: int) -> bool:
    try:
        socket.socket(family, kind).close()
    except OSError:
        return False
    return True


def sends_udp() -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.sendto(b"x", ("8.8.8.8", 53))
        except OSError:
            return False
    return True


def table(path: str) -> list[list[str]]:
    return [line.split() for line in (read(path) or b"").decode().splitlines()]


def main() -> None:
    words, places, paths = (json.loads(text) for text in sys.argv[1:4])
    words = [word[::-1] for word in words]
    running = processes()
    told = json.dumps(running) + json.dumps(dict(os.environ))
    found = ["process" for word in words if word in told]
    for path in files():
        data = read(path) or b""
        found += [path for word in words if word.encode() in data]
    mounts = [line.split() for line in (read("/proc/self/mounts") or b"").decode().splitlines()]
    report = {
        "interfaces": [name for _, name in socket.if_nameindex()],
        "routes": sorted({row[0] for row in table("/proc/net/route")[1:]}),
        "routes6": sorted({row[-1] for row in table("/proc/net/ipv6_route")}),
        "sockets": sorted({row[7] for row in table("/proc/net/unix")[1:] if len(row) > 7}),
        "connects": {place: connect(place) for place in places},
        "udp": sends_udp(),
        "raw": opened(socket.AF_INET, socket.SOCK_RAW),
        "packet": opened(socket.AF_PACKET, socket.SOCK_RAW),
        "found": found,
        "processes": [
            {"command": p["command"][:200], "memory": p["memory"], "fds": p["fds"]} for p in running.values()
        ],
        "variables": sorted(os.environ),
        "writable": sorted({row[1] for row in mounts if "rw" in row[3].split(",") and os.access(row[1], os.W_OK)}),
        "uid": os.getuid(),
        "present": [path for path in (*paths, "/var/run/docker.sock", "/run/docker.sock") if os.path.exists(path)],
        "own": [path for path in ("/vol", "/run/cortex", "/opt/cortex/packages") if os.access(path, os.W_OK)],
    }
    print(json.dumps(report, separators=(",", ":")))


if __name__ == "__main__":
    main()
