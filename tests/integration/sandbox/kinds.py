"""The drivers that the suite is run over, and when one cannot be tried here."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from broker.config import DockerConfig, ProcessConfig
from broker.host.tasks import TaskOwner
from broker.sandbox.docker import DockerDriver
from broker.sandbox.driver import SandboxDriver
from broker.sandbox.process import ProcessDriver
from tests.integration.sandbox.rig import DIALLER

IMAGE = os.environ.get("CORTEX_TEST_IMAGE", "cortex-sandbox:latest")
SUITE_IN_DOCKER = "/opt/cortex/packages/dialler.py"


@functools.cache
def docker_missing() -> str:
    if os.environ.get("CORTEX_TEST_DOCKER") == "required":
        return ""
    command = ["docker", "image", "inspect", IMAGE]
    try:
        done = subprocess.run(command, capture_output=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return "" if done.returncode == 0 else f"no Docker Engine with image {IMAGE}"


def make_docker(tasks: TaskOwner, installation: str, state: Path) -> SandboxDriver:
    config = DockerConfig(image=IMAGE, memory_bytes=256 * 2**20, cpus=1, pids=64, tmp_bytes=16 * 2**20)
    entry = ("python3", "-I", "-S", SUITE_IN_DOCKER)
    return DockerDriver(config, installation=installation, node="here", tasks=tasks, entry=entry, state_dir=state)


def make_process(tasks: TaskOwner, installation: str, state: Path) -> SandboxDriver:
    entry = (sys.executable, "-I", "-S", str(DIALLER))
    return ProcessDriver(ProcessConfig(), installation=installation, state_dir=state, tasks=tasks, entry=entry)


def make_plain(tasks: TaskOwner, installation: str, state: Path) -> SandboxDriver:
    entry = (sys.executable, "-I", "-S", str(DIALLER))
    return ProcessDriver(
        ProcessConfig(allow_unisolated=True),
        installation=installation,
        state_dir=state,
        tasks=tasks,
        entry=entry,
        bwrap_path="no-bwrap-here",
    )


def bwrap_missing() -> str:
    return "" if shutil.which("bwrap") else "bubblewrap is not installed"


DOCKER = pytest.param("docker", marks=pytest.mark.docker)
EVERY = pytest.mark.parametrize("world", [DOCKER, "process", "plain", "fake"], indirect=True)
REAL = pytest.mark.parametrize("world", [DOCKER, "process", "plain"], indirect=True)
ISOLATED = pytest.mark.parametrize("world", [DOCKER, "process"], indirect=True)
