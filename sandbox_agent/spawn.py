"""Starts a process with pipes for its standard streams. Light: boot imports it before anything else.

The child leads a session and a process group of its own, starts with default signal handling and
has nothing open but its three standard streams.
"""

from __future__ import annotations

import errno
import os
import signal
import socket

from sandbox_agent import homefiles, proxies

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_DEFAULT_SIGNALS = (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)


class SpawnError(Exception):
    """The process cannot be started: stable ``code``, ``what`` and a ``hint``."""

    def __init__(self, code: str, what: str, hint: str) -> None:
        super().__init__(what)
        self.code = code
        self.what = what
        self.hint = hint


class Child:
    """A running process and our ends of its pipes. ``pidfd`` is -1 where the kernel has none;
    ``port`` is what ``{port}`` stood for, 0 when it was not asked for."""

    __slots__ = ("pid", "pidfd", "port", "stderr", "stdin", "stdout")

    def __init__(self, pid: int, pidfd: int, stdin: int, stdout: int, stderr: int) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self.stdin = stdin
        self.stdout = stdout
        self.stderr = stderr
        self.port = 0


class Surroundings:
    """What is the same for each start: the home and the loopback ports of the forwarders."""

    __slots__ = ("egress_port", "gateway_port", "home", "package", "python")

    def __init__(self, *, home: str, gateway_port: int, egress_port: int, python: str, package: str) -> None:
        self.home = home
        self.gateway_port = gateway_port
        self.egress_port = egress_port
        self.python = python
        self.package = package

    def places(self) -> dict[str, str]:
        """Placeholders and what they stand for, all but ``{port}``."""
        return {
            "{python}": self.python,
            "{sandbox_agent}": self.package,
            "{home}": self.home,
            "{gateway}": f"http://127.0.0.1:{self.gateway_port}",
            "{egress}": f"http://127.0.0.1:{self.egress_port}",
        }

    def environment_with(self, env: dict[str, str]) -> dict[str, str]:
        """``environment`` and what an agent is given besides, its placeholders filled in, all but ``{port}``."""
        places = self.places()
        return proxies.over(self.environment(), {name: fill(value, places) for name, value in env.items()})

    def environment(self) -> dict[str, str]:
        """Our own environment (the driver keeps it clean) with HOME and the proxy put in."""
        env = dict(os.environ)
        env.setdefault("PATH", DEFAULT_PATH)
        env.setdefault("LANG", "C.UTF-8")
        env["HOME"] = self.home
        return env | proxies.variables(self.egress_port)


def fill(text: str, places: dict[str, str]) -> str:
    """``text`` with its placeholders replaced; other braces stay."""
    for name, value in places.items():
        if name in text:
            text = text.replace(name, value)
    return text


def launch(
    command: list[str], env: dict[str, str], files: dict[str, str], cwd: str, surroundings: Surroundings
) -> Child:
    """Starts an agent: fills placeholders in, writes missing ``files``, runs ``command`` in ``cwd``,
    which is made when it is missing (a new user's workspace). Raises ``SpawnError``.
    """
    places = surroundings.places()
    port = 0
    if any("{port}" in word for word in command):
        port = free_port()
        places["{port}"] = str(port)
    full = proxies.over(surroundings.environment(), {name: fill(value, places) for name, value in env.items()})
    try:
        homefiles.write_missing(surroundings.home, {fill(p, places): fill(t, places) for p, t in files.items()})
    except (homefiles.UnsafePath, OSError) as error:
        raise SpawnError(
            "agent.failed",
            f"a file of the agent cannot be written: {error}",
            "look at the agent's files in config.toml",
        ) from error
    directory = fill(cwd, places)
    try:
        os.makedirs(directory, mode=0o755, exist_ok=True)
    except OSError as error:
        raise SpawnError(
            "agent.failed",
            f"the workspace {directory!r} cannot be made: {error.strerror}",
            "choose another path in section workspace, or remove what is in its place",
        ) from error
    child = spawn([fill(word, places) for word in command], full, directory)
    child.port = port
    return child


def check(command: list[str], env: dict[str, str], surroundings: Surroundings) -> None:
    """Raises ``SpawnError`` when the program of ``command`` is not there or not executable."""
    places = surroundings.places()
    full = proxies.over(surroundings.environment(), {name: fill(value, places) for name, value in env.items()})
    resolve(fill(command[0], places) if command else "", full)


def free_port() -> int:
    """A loopback TCP port that nobody listens on right now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def resolve(program: str, env: dict[str, str]) -> str:
    """The path of ``program``, looked up in PATH when it has no slash. Raises ``SpawnError``."""
    if "/" in program:
        found = [program]
    else:
        found = [os.path.join(place, program) for place in env.get("PATH", DEFAULT_PATH).split(":") if place]
    for path in found:
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    if any(os.path.isfile(path) for path in found):
        raise _missing(f"{program!r} is not executable")
    raise _missing(f"{program!r} is not in the sandbox")


def _missing(what: str) -> SpawnError:
    return SpawnError(
        "agent.not_in_image",
        what,
        "install the agent in the sandbox image (Dockerfile.sandbox, build argument AGENTS), or mend its command "
        "in config.toml",
    )


def spawn(argv: list[str], env: dict[str, str], cwd: str) -> Child:
    """Runs ``argv`` in ``cwd``; returns once the program is executing. Raises ``SpawnError``."""
    program = resolve(argv[0] if argv else "", env)
    ends: list[int] = []
    try:
        for _ in range(3):
            ends += os.pipe()
        pid = _posix_spawn(program, argv, env, cwd, (ends[0], ends[3], ends[5]))
    except OSError as error:
        _close(ends)
        if isinstance(error, (FileNotFoundError, PermissionError, NotADirectoryError)) or error.errno == errno.ENOEXEC:
            raise _missing(f"{program!r} cannot be run in {cwd!r}: {error.strerror}") from error
        raise SpawnError(
            "agent.failed", f"{program!r} cannot be started: {error.strerror}", "the sandbox is short of something"
        ) from error
    _close([ends[0], ends[3], ends[5]])
    for end in (ends[1], ends[2], ends[4]):
        os.set_blocking(end, False)
    _offer_to_oom_killer(pid)
    return Child(pid, _pidfd(pid), ends[1], ends[2], ends[4])


def _posix_spawn(program: str, argv: list[str], env: dict[str, str], cwd: str, streams: tuple[int, int, int]) -> int:
    # No chdir action in posix_spawn: the whole program changes directory. All its own paths are absolute.
    before = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.chdir(cwd)
        actions = [(os.POSIX_SPAWN_DUP2, end, number) for number, end in enumerate(streams)]
        return os.posix_spawn(
            program, argv, env, file_actions=actions, setsid=True, setsigmask=(), setsigdef=_DEFAULT_SIGNALS
        )
    finally:
        os.fchdir(before)
        os.close(before)


def _close(ends: list[int]) -> None:
    for end in ends:
        os.close(end)


def _pidfd(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except OSError:
        return -1


def _offer_to_oom_killer(pid: int) -> None:
    """When memory runs out the agent goes, not the agent server that can restart it."""
    try:
        with open(f"/proc/{pid}/oom_score_adj", "w") as file:
            file.write("500")
    except OSError:
        return
