"""What `cortex doctor` looks at. Each check returns findings; none changes anything that lasts."""

from __future__ import annotations

import asyncio
import os
import resource
import stat
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from broker.cli.options import settings
from broker.config import Config
from broker.control.keyfiles import admin_token, hook_keys
from broker.errors import Code, CortexError
from broker.host.tasks import TaskOwner
from broker.sandbox.docker import DockerDriver
from broker.sandbox.driver import SandboxDriver
from broker.sandbox.drivers import sandbox_uid
from broker.sandbox.ground import sockets_fit
from broker.sandbox.process import ProcessDriver
from broker.sandbox.slots import Slots
from broker.settings import Loaded
from broker.store.db import SAFE_SQLITE
from broker.store.keys import KeyFile

Level = Literal["ok", "note", "warning", "failure"]

NEWEST_PYTHON = (3, 13)
NOFILE_WANTED = 65_536
ENGINE_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Finding:
    """``code`` is stable; ``fix``: the command that mends it, "" when nothing has to be."""

    code: str
    level: Level
    what: str
    fix: str = ""


def check_settings(config: Path | None) -> tuple[list[Finding], Loaded | None]:
    """The settings file, and what it says if it is valid."""
    try:
        loaded = settings(config)
    except CortexError as error:
        return [Finding("config.valid", "failure", str(error.what), error.hint)], None
    return [Finding("config.valid", "ok", f"{loaded.path or 'no settings file, defaults'}: valid")], loaded


def check_python(version: tuple[int, ...]) -> Finding:
    """The interpreter: 3.11 to 3.13 are tested."""
    text = ".".join(map(str, version))
    if version[:2] > NEWEST_PYTHON:
        return Finding("host.python", "note", f"Python {text} is newer than what was tested", "use Python 3.13")
    return Finding("host.python", "ok", f"Python {text}")


def check_sqlite(version: tuple[int, ...]) -> Finding:
    """SQLite's own library."""
    text = ".".join(map(str, version))
    if version >= SAFE_SQLITE:
        return Finding("host.sqlite", "ok", f"SQLite {text}")
    wanted = ".".join(map(str, SAFE_SQLITE))
    return Finding(
        "host.sqlite",
        "note",
        f"SQLite {text}; before {wanted} two programs that checkpoint one database can lose commits. "
        "The broker checkpoints alone",
        "never open cortex.db with another program while the broker runs",
    )


def check_limits(soft: int, hard: int) -> list[Finding]:
    """RLIMIT_NOFILE; the broker raises the soft limit itself."""
    if hard == resource.RLIM_INFINITY or hard >= NOFILE_WANTED:
        return [Finding("host.nofile", "ok", f"{hard} open files at most ({soft} before the broker raises it)")]
    return [
        Finding(
            "host.nofile",
            "warning",
            f"at most {hard} open files; a client takes two",
            f"LimitNOFILE={NOFILE_WANTED} in the unit, or ulimit -Hn {NOFILE_WANTED}",
        )
    ]


def check_user(config: Config, euid: int, uid: int, groups: tuple[int, ...]) -> list[Finding]:
    """Who runs the broker (``euid``) and its sandboxes (``uid``), and what that weakens."""
    if euid == 0:
        return [Finding("host.user", "note", f"runs as root; sandboxes get uid {uid}")]
    if uid != euid:
        found = [Finding("host.user", "ok", f"runs as uid {euid}; sandboxes get uid {uid}")]
    else:
        found = [
            Finding(
                "host.user",
                "note",
                f"runs as uid {euid}; sandboxes share that uid, so what escapes one can read the broker's state",
                "for other people's work run it as a service with the docker driver: systemd/cortex.service",
            )
        ]
    sock = Path("/var/run/docker.sock")
    if config.sandbox.driver == "docker" and sock.exists() and sock.stat().st_gid in groups:
        found.append(
            Finding("host.docker_group", "note", "this user is in the engine's group; that is as good as being root")
        )
    return found


def check_state(config: Config) -> list[Finding]:
    """The state directory: writable, on one mount, socket paths short enough."""
    state = config.broker.state_dir
    assert state is not None
    try:
        sockets_fit(state / "slots" / ("0" * 8) / "sock", state)
    except CortexError as error:
        return [Finding("state.directory", "failure", str(error), error.hint)]
    if not state.exists():
        parent = next(path for path in state.parents if path.exists())
        if os.access(parent, os.W_OK | os.X_OK):
            return [Finding("state.directory", "ok", f"{state} will be made at the first start")]
        return [Finding("state.directory", "failure", f"{state} cannot be made", f"sudo install -d -o $USER {state}")]
    owner = state.stat().st_uid
    if owner != os.geteuid():
        return [
            Finding(
                "state.directory",
                "warning",
                f"{state} belongs to uid {owner}; what is in it was not checked",
                f"sudo -u '#{owner}' cortex doctor",
            )
        ]
    try:
        Slots(state, uid=sandbox_uid(config)).check()
    except CortexError as error:
        return [Finding("state.directory", "failure", str(error), error.hint)]
    return [Finding("state.directory", "ok", f"{state}: writable, on one mount, short enough for sockets")]


def check_secrets(config: Config) -> list[Finding]:
    """The admin token, the hook secrets and the vault's keys."""
    files: Mapping[str, tuple[str, Callable[[Path], Any]]] = {
        "access.admin_token": (config.control.admin_token_file, admin_token),
        "access.hook_secrets": (config.control.hook_secrets_file, hook_keys),
        "vault.key": (config.vault.key_file, lambda path: KeyFile.at(path, os.environ).read()),
    }
    found = []
    for code, (name, read) in files.items():
        path = Path(name)
        if not path.exists():
            found.append(Finding(code, "ok", f"{path} will be made at the first start"))
            continue
        try:
            read(path)
            mode = stat.S_IMODE(path.stat().st_mode)
            found.append(Finding(code, "ok", f"{path}: mode {mode:04o}"))
        except CortexError as error:
            found.append(Finding(code, "failure", str(error), error.hint))
    return found


async def check_docker(config: Config) -> list[Finding]:
    """The engine and the sandbox image; a failure only where they are needed."""
    bad: Level = "failure" if config.sandbox.driver == "docker" else "note"
    error = await driver_problem(config, "docker")
    if error is None:
        return [Finding("docker.engine", "ok", f"the engine answers; image {config.sandbox.docker.image} is there")]
    if error.code is Code.IMAGE_MISSING:
        engine = Finding("docker.engine", "ok", "the engine answers")
        return [engine, Finding("docker.image", bad, str(error), error.hint)]
    return [Finding("docker.engine", bad, str(error), error.hint)]


async def check_bwrap(config: Config) -> list[Finding]:
    """A trial sandbox of the process driver; a failure only where it is needed."""
    error = await driver_problem(config, "process")
    if error is None:
        return [Finding("process.bubblewrap", "ok", "bubblewrap makes sandboxes")]
    needed = config.sandbox.driver == "process" and not config.sandbox.process.allow_unisolated
    return [Finding("process.bubblewrap", "failure" if needed else "note", str(error), error.hint)]


async def driver_problem(config: Config, name: Literal["docker", "process"]) -> CortexError | None:
    """Opens a driver in an installation of its own, which makes its trial; None when all is well."""
    try:
        async with asyncio.timeout(ENGINE_TIMEOUT_S), _driver(config, name) as driver:
            await driver.open()
    except CortexError as error:
        return error
    except TimeoutError:
        return CortexError(Code.ENGINE_TIMEOUT, f"the {name} driver did not open", hint="docker version")
    return None


@asynccontextmanager
async def _driver(config: Config, name: Literal["docker", "process"]) -> AsyncIterator[SandboxDriver]:
    tasks = TaskOwner("doctor")
    with tempfile.TemporaryDirectory(prefix="cortex-doctor-") as directory:
        driver: SandboxDriver
        if name == "docker":
            driver = DockerDriver(
                config.sandbox.docker, installation="doctor", node="doctor", tasks=tasks, state_dir=Path(directory)
            )
        else:
            process = config.sandbox.process.model_copy(update={"allow_unisolated": False})
            driver = ProcessDriver(process, installation="doctor", state_dir=Path(directory), tasks=tasks)
        try:
            yield driver
        finally:
            await driver.close()
            await tasks.close()
