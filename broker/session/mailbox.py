"""The mailbox of an actor: bounded, in order, and nobody who asked is left without an answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import structlog

from broker.errors import Code, CortexError

log = structlog.get_logger(__name__)

SIZE = 256
RESERVED = 64
"""Places that only the actor's own events may take; each kind of them waits at most a few times."""

Command = Callable[[], Awaitable[None]]


class Mailbox:
    """``owner`` is for the log; ``on_crash`` hears of an error that no command may raise."""

    def __init__(self, owner: str, on_crash: Callable[[Exception], Awaitable[None]]) -> None:
        self._owner = owner
        self._on_crash = on_crash
        self._queue: asyncio.Queue[Command] = asyncio.Queue(SIZE)
        self._once: set[str] = set()
        self._open: set[asyncio.Future[Any]] = set()
        self._busy = False
        self._closed = False

    @property
    def idle(self) -> bool:
        """Nothing is being done and nothing waits."""
        return self._queue.empty() and not self._busy

    def post(self, command: Command) -> None:
        """An event of the actor's own. One that may come often goes through ``post_once``."""
        if not self._closed:
            self._queue.put_nowait(command)

    def post_once(self, name: str, command: Command) -> None:
        """Does nothing while a command of that name waits; so the bound holds, whoever causes it."""
        if name in self._once or self._closed:
            return
        self._once.add(name)

        async def once() -> None:
            self._once.discard(name)
            await command()

        self.post(once)

    async def ask(self, work: Callable[[], Awaitable[Any]]) -> Any:
        """Has the actor do ``work`` and returns what it gives.

        Raises ``MAILBOX_FULL``, what ``work`` raises (``INTERNAL`` for a crash), and ``SESSION_STOPPED``
        when the mailbox is closed before.
        """
        if self._closed:
            raise _let_go()
        if self._queue.qsize() >= SIZE - RESERVED:
            raise CortexError(Code.MAILBOX_FULL, "the session has too much to do", hint="try again in a few seconds")
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._open.add(answer)

        async def command() -> None:
            try:
                result = await work()
            except CortexError as error:
                _fail(answer, error)
            except Exception as error:
                _fail(answer, crashed(error))
                raise
            else:
                if not answer.done():
                    answer.set_result(result)

        self.post(command)
        try:
            return await answer
        finally:
            self._open.discard(answer)

    async def run(self) -> None:
        """Does one command after the other, for ever; an error ends none but its own."""
        while True:
            command = await self._queue.get()
            self._busy = True
            try:
                await self._do(command)
            finally:
                self._busy = False

    async def _do(self, command: Command) -> None:
        try:
            await command()
        except CortexError as error:
            log.warning("session_command_failed", session=self._owner, error=str(error), hint=error.hint)
        except Exception as error:
            log.exception("session_command_crashed", session=self._owner)
            try:
                await self._on_crash(error)
            except Exception:
                log.exception("session_crash_not_handled", session=self._owner)

    def close(self) -> None:
        """Takes nothing more; whoever still waits for an answer is told. Cancel ``run`` before. Idempotent."""
        self._closed = True
        for answer in list(self._open):
            _fail(answer, _let_go())


def crashed(error: BaseException) -> CortexError:
    """What a bug looks like to a user."""
    return CortexError(
        Code.INTERNAL,
        "the broker made a mistake",
        cause=f"{type(error).__name__}: {error}"[:400],
        hint="try again; the broker's log says more",
    )


def _fail(answer: asyncio.Future[Any], error: CortexError) -> None:
    if not answer.done():
        answer.set_exception(error)


def _let_go() -> CortexError:
    return CortexError(Code.SESSION_STOPPED, "the session has left memory", hint="try again")
