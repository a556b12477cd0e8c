"""From exec to the agent process running, with as few imports as that takes.

Order: undumpable, dial, hello, welcome, spawn the agent. Only then is the rest imported (asyncio,
uvloop, websockets: 100 ms), while the agent starts beside it. The messages are maps here, because
importing their dataclasses costs 25 ms; a test holds them against ``wire.messages``.
"""

from __future__ import annotations

import ctypes
import os
import socket
import sys
import time
from typing import Any

from sandbox_agent import memory, spawn
from sandbox_agent.wire import codec

BOOT_TIMEOUT_S = 60.0
"""How long to try for a first welcome."""
WELCOME_TIMEOUT_S = 20.0
"""How long one connection may take to welcome."""
RETRY_S = (0.05, 1.0)
"""First and longest pause between dials."""
_PR_SET_DUMPABLE = 4
_BACKLOG = 128


class Booted:
    """What the boot hands to the server. ``child`` and ``failure``: at most one is there."""

    def __init__(self, socket_dir: str, vol: str) -> None:
        self.socket_dir = socket_dir
        self.vol = vol
        self.control: socket.socket
        self.welcome: dict[str, Any] = {}
        self.gateway: socket.socket
        self.egress: socket.socket
        self.surroundings: spawn.Surroundings
        self.child: spawn.Child | None = None
        self.failure: spawn.SpawnError | None = None
        self.started_ms = 0.0
        self.memory = -1
        """Descriptor for ``memory.pss``."""


def main(argv: list[str]) -> int:
    """Runs the agent server; returns the exit code."""
    try:
        booted = Booted(*parse(argv))
    except ValueError as error:
        say(str(error))
        return 64
    booted.memory = memory.open_meter()
    guard()
    try:
        booted.control, booted.welcome = first_welcome(os.path.join(booted.socket_dir, "agent"))
    except TimeoutError as error:
        say(str(error))
        return 75
    start(booted)
    from sandbox_agent.server import serve

    return serve(booted)


def parse(argv: list[str]) -> tuple[str, str]:
    """``(socket directory, volume)`` as absolute paths. Raises ``ValueError``."""
    given = dict(zip(argv[::2], argv[1::2], strict=False))
    if len(argv) != 4 or set(given) != {"--socket-dir", "--vol"}:
        raise ValueError("usage: __main__.py --socket-dir DIR --vol DIR")
    return os.path.abspath(given["--socket-dir"]), os.path.abspath(given["--vol"])


def guard() -> None:
    """Keeps memory and descriptors from processes of the same uid, and strays from the agent."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        say("cannot become undumpable")
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open("/dev/null", os.O_RDWR)
    for name in os.listdir("/proc/self/fd"):
        try:
            os.set_inheritable(int(name), int(name) < 3)
        except OSError:
            continue


def first_welcome(path: str) -> tuple[socket.socket, dict[str, Any]]:
    """Dials until welcomed. Raises ``TimeoutError`` after ``BOOT_TIMEOUT_S``."""
    end = time.monotonic() + BOOT_TIMEOUT_S
    pause = RETRY_S[0]
    while True:
        try:
            return greet(path)
        except (OSError, EOFError, codec.WireError) as error:
            if time.monotonic() + pause > end:
                raise TimeoutError(f"no welcome from {path} in {BOOT_TIMEOUT_S:.0f} s: {error}") from error
        time.sleep(pause)
        pause = min(pause * 2, RETRY_S[1])


def greet(path: str) -> tuple[socket.socket, dict[str, Any]]:
    """One dial: preamble and hello out, welcome in. Raises ``OSError``, ``EOFError`` or ``WireError``."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(WELCOME_TIMEOUT_S)
        sock.connect(path)
        preamble = {"t": "preamble", "kind": "control", "version": codec.VERSION}
        sock.sendall(codec.pack(preamble) + codec.pack({"t": "hello", "pid": os.getpid()}))
        welcome = codec.unpack(_exactly(sock, codec.length(_exactly(sock, codec.HEADER))))
        if welcome.get("t") != "welcome":
            raise codec.WireError(f"expected a welcome, got {str(welcome.get('t'))[:40]!r}")
    except BaseException:
        sock.close()
        raise
    return sock, welcome


def _exactly(sock: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = sock.recv(size - len(data))
        if not piece:
            raise EOFError("the broker hung up")
        data += piece
    return bytes(data)


def start(booted: Booted) -> None:
    """Binds the forwarders' ports (the agent is told them) and starts the agent if it is known."""
    begun = time.monotonic()
    welcome = booted.welcome
    booted.gateway = listen(welcome.get("gateway_port", 0))
    booted.egress = listen(welcome.get("egress_port", 0))
    booted.surroundings = spawn.Surroundings(
        home=welcome.get("home") or os.path.join(booted.vol, "home"),
        gateway_port=booted.gateway.getsockname()[1],
        egress_port=booted.egress.getsockname()[1],
        python=sys.executable,
        package=os.path.dirname(os.path.abspath(__file__)),
    )
    spec = welcome.get("agent_spec")
    if spec is None:
        return
    try:
        booted.child = spawn.launch(
            spec["command"], spec.get("env", {}), spec.get("files", {}), spec.get("cwd", "/"), booted.surroundings
        )
    except spawn.SpawnError as error:
        booted.failure = error
    booted.started_ms = (time.monotonic() - begun) * 1000


def listen(port: int) -> socket.socket:
    """A listening loopback socket; on any free port when ``port`` is 0 or taken."""
    for wanted in (port, 0):
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", wanted))
            sock.listen(_BACKLOG)
        except OSError as error:
            sock.close()
            say(f"port {wanted}: {error.strerror}")
            continue
        sock.setblocking(False)
        return sock
    raise SystemExit("agent server: there is no loopback to listen on")


def say(text: str) -> None:
    """One line on standard error, where the driver keeps it."""
    os.write(2, f"agent server: {text}\n".encode())
