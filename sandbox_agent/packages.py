"""Installs one MCP package in a builder sandbox, which has no tenant and no identity.

npm: ``build/node_modules/…``; PyPI: ``build/lib`` with a launcher for each command in ``build/bin``.
Nothing in the result names the build directory, so that the broker can publish it by rename.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import sys

from sandbox_agent import spawn
from sandbox_agent.wire.messages import Build, Built

NPM_SPEC = re.compile(
    r"(?P<name>(?:@[a-z0-9~][a-z0-9._~-]*/)?[a-zA-Z0-9~][a-zA-Z0-9._~-]*)(?:@(?P<version>[\w.^~<>=*+-]+))?"
)
"""A package in a registry. Never a URL, a git address or a path: those run what they like."""
PYPI_SPEC = re.compile(
    r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)(?:\[[A-Za-z0-9,._-]+\])?(?:(?:==|@)(?P<version>[A-Za-z0-9.!+_-]+))?"
)
MAX_TAIL = 4096
"""How much of the installer's output is kept, in bytes."""
LAUNCHER = """#!/usr/bin/env python3
import os, sys
sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.realpath(__file__))), "lib"))
from {module} import {first}
sys.exit({call}())
"""


class BuildError(Exception):
    """The package cannot be installed; the text says why."""


async def build(request: Build, surroundings: spawn.Surroundings) -> Built:
    """Installs into HOME/build, which is emptied first and after a failure. Never raises but ``CancelledError``."""
    place = os.path.join(surroundings.home, "build")
    done = False
    try:
        await asyncio.to_thread(_empty, place)
        async with asyncio.timeout(request.timeout_s):
            if request.ecosystem == "npm":
                built = await _npm(request, place, surroundings)
            elif request.ecosystem == "pypi":
                built = await _pypi(request, place, surroundings)
            else:
                raise BuildError(f"unknown ecosystem {request.ecosystem[:40]!r}")
        done = True
        return built
    except TimeoutError:
        return Built(request.id, False, what=f"installing {request.package!r} took over {request.timeout_s:g} s")
    except (BuildError, OSError, ValueError, KeyError) as error:
        return Built(request.id, False, what=f"{request.package!r}: {error}"[:MAX_TAIL])
    finally:
        if not done:
            await asyncio.to_thread(shutil.rmtree, place, True)


def _empty(place: str) -> None:
    shutil.rmtree(place, ignore_errors=True)
    os.makedirs(place)


async def _npm(request: Build, place: str, surroundings: spawn.Surroundings) -> Built:
    spec = NPM_SPEC.fullmatch(request.package)
    if spec is None:
        raise BuildError("not the name of a package in a registry")
    command = [
        "npm",
        "install",
        "--prefix",
        place,
        "--no-audit",
        "--no-fund",
        "--no-update-notifier",
        "--install-links",
    ]
    command += [] if request.scripts else ["--ignore-scripts"]
    command += ["--registry", request.registry] if request.registry else []
    await _run([*command, "--", request.package], surroundings, place)
    return await asyncio.to_thread(_npm_result, request.id, place, spec["name"])


def _npm_result(number: int, place: str, name: str) -> Built:
    with open(os.path.join(place, "node_modules", name, "package.json"), "rb") as file:
        manifest = json.load(file)
    with open(os.path.join(place, "package-lock.json"), "rb") as file:
        lock = hashlib.sha256(file.read()).hexdigest()
    declared = manifest.get("bin") or {}
    if isinstance(declared, str):
        declared = {name.rpartition("/")[2]: declared}
    bins = {}
    for command in declared:
        path = os.path.join("node_modules", ".bin", command)
        if "/" not in command and os.path.exists(os.path.join(place, path)):
            bins[command] = path
    return Built(number, True, f"sha256-{lock}", bins, str(manifest.get("version", "")))


async def _pypi(request: Build, place: str, surroundings: spawn.Surroundings) -> Built:
    spec = PYPI_SPEC.fullmatch(request.package)
    if spec is None:
        raise BuildError("not the name of a package in an index")
    wanted = request.package.replace("@", "==")
    command = [*_pip(), "install", "--target", os.path.join(place, "lib"), "--no-input", "--no-compile"]
    command += ["--disable-pip-version-check", "--no-cache-dir"]
    command += [] if request.scripts else ["--only-binary=:all:"]
    command += ["--index-url", request.registry] if request.registry else []
    await _run([*command, "--", wanted], surroundings, place)
    return await asyncio.to_thread(_pypi_result, request.id, place, spec["name"])


def _pip() -> list[str]:
    """A pip that runs under a python3 on PATH, as the launchers will."""
    for python in (shutil.which("python3"), sys.executable):
        prefix = os.path.dirname(os.path.dirname(python or ""))
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        places = [os.path.join(prefix, "lib", version, "site-packages"), "/usr/lib/python3/dist-packages"]
        if python and any(os.path.isdir(os.path.join(place, "pip")) for place in places):
            return [python, "-m", "pip"]
    raise BuildError("there is no pip in the sandbox; install python3-pip in the image")


def _pypi_result(number: int, place: str, name: str) -> Built:
    from importlib.metadata import distributions

    lib = os.path.join(place, "lib")
    shutil.rmtree(os.path.join(lib, "bin"), ignore_errors=True)  # they name the build directory
    os.makedirs(os.path.join(place, "bin"))
    lock, bins, version = [], {}, ""
    for found in distributions(path=[lib]):
        record = hashlib.sha256((found.read_text("RECORD") or "").encode()).hexdigest()
        lock.append(f"{found.name}=={found.version} {record}")
        if _canonical(found.name) != _canonical(name):
            continue
        version = found.version
        for entry in found.entry_points.select(group="console_scripts"):
            path = os.path.join("bin", os.path.basename(entry.name))
            first, _, _ = entry.attr.partition(".")
            launcher = os.open(os.path.join(place, path), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o755)
            with open(launcher, "w") as file:
                file.write(LAUNCHER.format(module=entry.module, first=first, call=entry.attr))
            bins[entry.name] = path
    if not version:
        raise BuildError("pip installed something else")
    integrity = hashlib.sha256("\n".join(sorted(lock)).encode()).hexdigest()
    return Built(number, True, f"sha256-{integrity}", bins, version)


def _canonical(name: str) -> str:
    """PEP 503."""
    return re.sub(r"[-_.]+", "-", name).lower()


async def _run(command: list[str], surroundings: spawn.Surroundings, cwd: str) -> None:
    """Runs an installer in a process group of its own, and leaves none of it. Raises ``BuildError``."""
    env = surroundings.environment() | {"npm_config_cache": os.path.join(surroundings.home, ".npm"), "CI": "1"}
    try:
        program = spawn.resolve(command[0], env)
    except spawn.SpawnError as error:
        raise BuildError(str(error)) from error
    process = await asyncio.create_subprocess_exec(
        program,
        *command[1:],
        env=env,
        cwd=cwd,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    tail = bytearray()
    try:
        assert process.stdout is not None
        while data := await process.stdout.read(65_536):
            tail += data
            del tail[:-MAX_TAIL]
        code = await process.wait()
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        if process.returncode is None:
            await process.wait()
    if code != 0:
        raise BuildError(f"{os.path.basename(program)} ended with {code}: {tail.decode(errors='replace').strip()}")
