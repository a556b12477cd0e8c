"""Watches a directory. Editors and config management replace files, so it is never a file that is watched."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import structlog
from watchfiles import awatch

from broker.errors import Code, CortexError

DEBOUNCE_MS = 400
STEP_MS = 100

log = structlog.get_logger(__name__)


async def watch(
    directory: Path,
    on_change: Callable[[set[Path]], Awaitable[None]],
    *,
    recursive: bool = False,
    started: asyncio.Event | None = None,
) -> None:
    """Calls ``on_change`` with the paths that changed, grouped in time, until it is cancelled.

    A ``CortexError`` of ``on_change`` is logged and the watch goes on. ``started`` is set when changes
    are seen from. Raises ``CortexError`` when the directory cannot be watched, or is gone.
    """
    if started is not None:
        # Runs when awatch first waits, and that is after it has set up its watch.
        asyncio.get_running_loop().call_soon(started.set)
    try:
        async for changes in awatch(
            directory, watch_filter=None, recursive=recursive, debounce=DEBOUNCE_MS, step=STEP_MS, rust_timeout=10_000
        ):
            await _tell(on_change, {Path(name) for _, name in changes})
            _check_there(directory)
    except OSError as error:
        raise CortexError(
            Code.INTERNAL,
            f"cannot watch {directory}",
            cause=error,
            hint="it has to exist; a shortage of watches is mended by sysctl fs.inotify.max_user_watches",
        ) from error


def _check_there(directory: Path) -> None:
    """A watch on a directory that was removed would never say anything again."""
    os.stat(directory)


async def _tell(on_change: Callable[[set[Path]], Awaitable[None]], paths: set[Path]) -> None:
    try:
        await on_change(paths)
    except CortexError as error:
        log.error("change_refused", what=str(error), hint=error.hint)
