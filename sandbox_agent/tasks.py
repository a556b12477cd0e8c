"""Tasks with a name and an owner; the only place in the agent server that creates one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
log = logging.getLogger("agent_server")


class TaskOwner:
    """Owns background tasks: cancels what still runs at ``close``, logs one that crashes at once."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False

    def __len__(self) -> int:
        return len(self._tasks)

    def start(
        self,
        coro: Coroutine[Any, Any, T],
        name: str,
        *,
        on_error: Callable[[BaseException], None] | None = None,
    ) -> asyncio.Task[T]:
        """Runs ``coro`` until it ends or ``close`` cancels it; ``on_error`` hears of a crash."""
        if self._closed:
            coro.close()
            raise RuntimeError(f"{self.name} is closed; it cannot start {name}")
        task = asyncio.get_running_loop().create_task(coro, name=f"{self.name}.{name}")
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._ended(done, on_error))
        return task

    def _ended(self, task: asyncio.Task[Any], on_error: Callable[[BaseException], None] | None) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is None:
            return
        if on_error is not None:
            on_error(error)
        else:
            log.error("task %s failed", task.get_name(), exc_info=error)

    async def close(self, *, timeout: float = 5.0) -> None:
        """Cancels what still runs and waits for it, ``timeout`` seconds at most."""
        self._closed = True
        current = asyncio.current_task()
        tasks = [task for task in self._tasks if task is not current]
        for task in tasks:
            task.cancel()
        if tasks:
            _, pending = await asyncio.wait(tasks, timeout=timeout)
            for task in pending:
                log.error("task %s is stuck", task.get_name())
