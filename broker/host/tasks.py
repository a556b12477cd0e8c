"""Tasks with a name and an owner; the only place that creates one.

A ``TaskOwner`` belongs to an object with a life: it awaits or cancels all that it started, and a
task that dies of an unexpected error is logged at once instead of when the collector finds it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import structlog

T = TypeVar("T")
A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")
log = structlog.get_logger(__name__)


class TaskOwner:
    """Owns background tasks. ``name`` prefixes each task's name."""

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
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            return
        if on_error is not None:
            on_error(error)
        else:
            log.error("task_failed", task=task.get_name(), exc_info=error)

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
                log.error("task_stuck", task=task.get_name())


async def both(first: Coroutine[Any, Any, A], second: Coroutine[Any, Any, B]) -> tuple[A, B]:
    """Runs two at once and returns their results; the first error cancels the other and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            one, two = group.create_task(first), group.create_task(second)
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return one.result(), two.result()


async def together(
    first: Coroutine[Any, Any, A], second: Coroutine[Any, Any, B], third: Coroutine[Any, Any, C]
) -> tuple[A, B, C]:
    """Runs three at once and returns their results; the first error cancels the others and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            one, two, three = group.create_task(first), group.create_task(second), group.create_task(third)
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return one.result(), two.result(), three.result()


def _told_by_result(error: BaseException) -> None:
    """Its awaiter raises it."""


async def first_of(first: Coroutine[Any, Any, A], second: Coroutine[Any, Any, B]) -> tuple[A | None, B | None]:
    """Runs two at once; returns when one has ended, with None for the one that was cancelled."""
    owner = TaskOwner("first_of")
    one = owner.start(first, "first", on_error=_told_by_result)
    two = owner.start(second, "second", on_error=_told_by_result)
    try:
        await asyncio.wait((one, two), return_when=asyncio.FIRST_COMPLETED)
        return (one.result() if one.done() else None), (two.result() if two.done() else None)
    finally:
        await owner.close()
