"""Which driver and which uid the settings ask for."""

from __future__ import annotations

import os
from pathlib import Path

from broker.config import Config
from broker.host.tasks import TaskOwner
from broker.sandbox.docker import DockerDriver
from broker.sandbox.driver import SandboxDriver
from broker.sandbox.process import ProcessDriver
from broker.sandbox.slots import Slots

SERVICE_UID = 64321
"""Uid of sandboxes unless configured, where the broker may give files away."""


_CAPABILITIES = 1 << 0 | 1 << 1 | 1 << 3
"""CAP_CHOWN, CAP_DAC_OVERRIDE and CAP_FOWNER, which systemd/cortex.service gives (capabilities(7))."""


def sandbox_uid(config: Config) -> int:
    """The uid of sandboxes: configured, else the service's where the broker can give homes to it, else its own.

    Without root bubblewrap cannot take another uid, whatever else the broker may do.
    """
    own = os.geteuid()
    if config.sandbox.uid:
        return config.sandbox.uid
    return SERVICE_UID if own == 0 or (config.sandbox.driver == "docker" and gives_files_away()) else own


def gives_files_away() -> bool:
    """This process has the capabilities of a service."""
    status = Path("/proc/self/status").read_text()
    effective = next((line for line in status.splitlines() if line.startswith("CapEff:")), "CapEff: 0")
    return int(effective.split()[1], 16) & _CAPABILITIES == _CAPABILITIES


def make_driver(config: Config, installation: str, tasks: TaskOwner, slots: Slots) -> SandboxDriver:
    """The driver of ``sandbox.driver``; there is never a fall-back from one to the other."""
    state_dir = slots.packages_dir.parent
    ca_file = Path(config.sandbox.ca_file) if config.sandbox.ca_file else None
    if config.sandbox.driver == "docker":
        return DockerDriver(
            config.sandbox.docker,
            installation=installation,
            node=config.broker.node,
            tasks=tasks,
            state_dir=state_dir,
            ca_file=ca_file,
        )
    return ProcessDriver(
        config.sandbox.process,
        installation=installation,
        state_dir=state_dir,
        tasks=tasks,
        uid=slots.uid,
        gid=slots.gid,
        ca_file=ca_file,
    )
