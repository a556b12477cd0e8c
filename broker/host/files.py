"""The process's file descriptors."""

from __future__ import annotations

import resource


def raise_file_limit() -> None:
    """As many descriptors as the host allows: each client takes two."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
