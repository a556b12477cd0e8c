"""Questions to an agent server that wait for their answer, by number."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from broker.errors import Code, CortexError
from sandbox_agent.wire.codec import WireError
from sandbox_agent.wire.messages import Bind, Bound, Build, Built, Message, Probe, Status

Answer = TypeVar("Answer", Bound, Built, Status)


class Questions:
    """Numbers start at 1 and never come again within a link."""

    def __init__(self) -> None:
        self._last = 0
        self._open: dict[int, tuple[type[Message], asyncio.Future[Any]]] = {}

    def number(self) -> int:
        """The next question's."""
        self._last += 1
        return self._last

    async def ask(
        self, send: Callable[[Message], None], message: Bind | Probe | Build, kind: type[Answer], timeout: float
    ) -> Answer:
        """Sends ``message`` and waits for an answer of ``kind``. Raises ``CortexError``."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._open[message.id] = (kind, future)
        try:
            send(message)
            async with asyncio.timeout(timeout):
                return await future
        except WireError as error:
            raise CortexError(
                Code.BAD_CONFIG, "the configuration cannot be sent", hint="make it smaller, or simpler", cause=error
            ) from error
        except TimeoutError:
            raise CortexError(
                Code.BRINGUP_TIMEOUT,
                f"the sandbox did not answer to {message.TYPE} within {timeout:g} s",
                hint="it is overloaded or stuck; stop the session to have a new one",
            ) from None
        finally:
            self._open.pop(message.id, None)

    def answered(self, message: Bound | Built | Status) -> None:
        """An answer has come. One to a question that is no longer open is dropped.

        Raises ``WireError`` for an answer that nobody asked for.
        """
        if not 0 < message.id <= self._last:
            raise WireError(f"an answer to nothing: {message.TYPE} {message.id}")
        if message.id not in self._open:
            return
        kind, future = self._open[message.id]
        if not isinstance(message, kind):
            raise WireError(f"{message.TYPE} where {kind.TYPE} was due")
        if not future.done():
            future.set_result(message)

    def fail(self, error: CortexError) -> None:
        """Every open question ends with ``error``."""
        for _, future in self._open.values():
            if not future.done():
                future.set_exception(error)
