"""What a host is: the facts that explain why one brings sandboxes up faster than another."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

from bench.lib import machine

CLOUD = Path("/run/cloud-init/instance-data.json")
"""Where cloud-init leaves what the cloud says of this machine (cloud-init documentation, "Instance metadata")."""
NVIDIA = Path("/proc/driver/nvidia/gpus")
ASK_S = 10.0


def facts() -> dict[str, Any]:
    """JSON-safe; what is not known is "" or 0. $CORTEX_REGION and $CORTEX_ACCELERATOR are believed before all else."""
    return {
        **machine(),
        "host": socket.gethostname(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "virtualization": virtualization(),
        "engine": engine(),
        "region": os.environ.get("CORTEX_REGION") or cloud("region"),
        "machine_type": cloud("instance_type") or cloud("machine_type"),
        "accelerator": os.environ.get("CORTEX_ACCELERATOR") or accelerator(NVIDIA),
    }


def cloud(name: str, path: Path = CLOUD) -> str:
    """A standardised fact of the cloud's."""
    try:
        told = json.loads(path.read_text())
    except (OSError, ValueError):
        return ""
    v1 = told.get("v1") if isinstance(told, dict) else None
    value = v1.get(name) if isinstance(v1, dict) else None
    return value if isinstance(value, str) else ""


def accelerator(gpus: Path) -> str:
    """Models of the NVIDIA GPUs, sorted, such as "NVIDIA A10 x2"."""
    models: dict[str, int] = {}
    with contextlib.suppress(OSError):
        for gpu in gpus.iterdir():
            for line in (gpu / "information").read_text().splitlines():
                name, _, value = line.partition(":")
                if name == "Model":
                    models[value.strip()] = models.get(value.strip(), 0) + 1
    return ", ".join(f"{model} x{count}" for model, count in sorted(models.items()))


def virtualization() -> str:
    """As systemd names it: kvm, amazon, none, …"""
    return _asked(["systemd-detect-virt"])


def engine() -> str:
    """Docker Engine's version and storage driver."""
    return _asked(["docker", "info", "--format", "{{.ServerVersion}} {{.Driver}}"])


def _asked(command: list[str]) -> str:
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=ASK_S)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip().splitlines()[0] if answer.stdout.strip() else ""
