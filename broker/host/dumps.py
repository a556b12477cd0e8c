"""Keeps a process that holds secrets from being read by others of its user, and from leaving its memory on a disk."""

from __future__ import annotations

import ctypes
import resource

import structlog

_PR_SET_DUMPABLE = 4  # linux/prctl.h
log = structlog.get_logger(__name__)


def forbid_dumps() -> None:
    """No core files, no ptrace and no look into /proc/PID/{mem,environ,fd} but by root; children are not held to the
    latter. Swap is the operator's: switched off, or encrypted."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        log.warning("still_dumpable", errno=ctypes.get_errno())
