"""The container that a ``SandboxSpec`` becomes: pure, no engine here.

Field names are those of the Engine API, ``POST /containers/create``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from broker.config import DockerConfig
from broker.sandbox.driver import (
    CREDENTIALS_BYTES,
    CREDENTIALS_DIR,
    HOME_DIR,
    PACKAGES_DIR,
    SOCK_DIR,
    VOL_DIR,
    Liveness,
    SandboxSpec,
)

LABEL = "io.cortex."
ENTRY = ("python3", "-I", "-S", "/opt/cortex/sandbox_agent/__main__.py")
"""How the agent server of the image starts; ``--socket-dir`` and ``--vol`` follow."""
CA_FILE = "/opt/cortex/ca.pem"
CA_VARIABLES = (
    "SSL_CERT_FILE",
    "NODE_EXTRA_CA_CERTS",
    "PIP_CERT",
    "REQUESTS_CA_BUNDLE",
    "GIT_SSL_CAINFO",
    "CURL_CA_BUNDLE",
)
"""Variables by which common programs are told of a bundle of certificate authorities."""

_SLOT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_LIVENESS: dict[str, Liveness] = {
    "created": "created",
    "running": "running",
    "restarting": "running",
    "paused": "paused",
    "removing": "exited",
    "exited": "exited",
    "dead": "exited",
}


def check_slot(slot: str) -> str:
    """``slot`` if it can be part of a name. Raises ``ValueError``."""
    if not _SLOT.fullmatch(slot):
        raise ValueError(f"slot id {slot!r} is not of the form {_SLOT.pattern}")
    return slot


def container_name(installation: str, slot: str, incarnation: int) -> str:
    """One name per incarnation, so that a create whose answer was lost is found again."""
    return f"cortex-{installation}-{check_slot(slot)}-{incarnation}"


def labels(spec: SandboxSpec, installation: str, node: str) -> dict[str, str]:
    """What ``list`` and an operator know a container by; the spec's own come in our name space too."""
    own = {
        f"{LABEL}installation": installation,
        f"{LABEL}node": node,
        f"{LABEL}slot": spec.slot,
        f"{LABEL}incarnation": str(spec.incarnation),
        f"{LABEL}role": spec.role,
    }
    return {f"{LABEL}label.{key}": value for key, value in spec.labels.items()} | own


def liveness(status: str) -> Liveness:
    """Our word for the engine's ``State.Status``."""
    return _LIVENESS.get(status, "exited")


def environment(*, ca: bool) -> list[str]:
    """The agent server's variables; no secret is ever among them."""
    env = [f"HOME={HOME_DIR}", "LANG=C.UTF-8", "USER=cortex", "LOGNAME=cortex", "SHELL=/bin/sh"]
    return env + [f"{name}={CA_FILE}" for name in CA_VARIABLES] if ca else env


def container_config(
    spec: SandboxSpec,
    config: DockerConfig,
    *,
    image_id: str,
    labels: Mapping[str, str],
    entry: Sequence[str] = ENTRY,
    files: Mapping[str, Path] | None = None,
) -> dict[str, Any]:
    """The body of a create. ``files``: target → source of further single files, read-only.

    The sandbox has no network, a read-only root, no capability and no way to gain one, a private
    ``/tmp``, a small tmpfs for credential files, and limits on memory (swap included), processors, processes and logs.
    """
    files = files or {}
    return {
        "Image": image_id,
        "Entrypoint": [*entry, "--socket-dir", SOCK_DIR, "--vol", VOL_DIR],
        "Cmd": [],
        "User": f"{spec.uid}:{spec.group}",
        "WorkingDir": "/",
        "Hostname": "cortex",
        "Env": environment(ca=CA_FILE in files),
        "Labels": dict(labels),
        "NetworkDisabled": True,
        "HostConfig": _host_config(spec, config, files),
    }


def _host_config(spec: SandboxSpec, config: DockerConfig, files: Mapping[str, Path]) -> dict[str, Any]:
    memory = spec.memory_bytes or config.memory_bytes
    host: dict[str, Any] = {
        "NetworkMode": "none",
        "ReadonlyRootfs": True,
        "Privileged": False,
        "CapDrop": ["ALL"],
        "SecurityOpt": ["no-new-privileges"],
        "Init": True,
        "IpcMode": "private",
        "CgroupnsMode": "private",
        "Memory": memory,
        "MemorySwap": memory,
        "NanoCpus": math.ceil((spec.cpus or config.cpus) * 1e9),
        "PidsLimit": spec.pids or config.pids,
        "OomScoreAdj": 500,
        "Ulimits": [{"Name": "core", "Soft": 0, "Hard": 0}],
        "Tmpfs": {
            "/tmp": f"rw,exec,nosuid,nodev,mode=1777,size={config.tmp_bytes}",
            CREDENTIALS_DIR: f"rw,nosuid,nodev,noexec,mode=0700,uid={spec.uid},gid={spec.group},"
            f"size={CREDENTIALS_BYTES}",
        },
        "Mounts": [
            _mount(spec.sock_dir, SOCK_DIR, read_only=True),
            _mount(spec.vol_dir, VOL_DIR, read_only=False),
            _mount(spec.packages_dir, PACKAGES_DIR, read_only=True),
            *(_mount(source, target, read_only=True) for target, source in files.items()),
        ],
        "LogConfig": {"Type": "json-file", "Config": {"max-size": "1m", "max-file": "1"}},
        "RestartPolicy": {"Name": "no"},
    }
    if config.runtime:
        host["Runtime"] = config.runtime
    return host


def _mount(source: Path, target: str, *, read_only: bool) -> dict[str, Any]:
    return {
        "Type": "bind",
        "Source": str(source.absolute()),
        "Target": target,
        "ReadOnly": read_only,
        "BindOptions": {"Propagation": "rprivate"},
    }
