"""Signals of the process: the first SIGTERM or SIGINT stops, the second forces, SIGHUP reloads."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from types import TracebackType

import structlog

log = structlog.get_logger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Signals:
    """A context in which the callbacks are called, in the event loop; afterwards the handlers are the default ones.

    ``received`` is the signal that stopped the process, for its exit status.
    """

    def __init__(self, *, stop: Callable[[], None], force: Callable[[], None], reload: Callable[[], None]) -> None:
        self._stop = stop
        self._force = force
        self._reload = reload
        self._loop: asyncio.AbstractEventLoop | None = None
        self.received: signal.Signals | None = None

    def __enter__(self) -> Signals:
        self._loop = asyncio.get_running_loop()
        for number in STOP_SIGNALS:
            self._loop.add_signal_handler(number, self._on_stop, number)
        self._loop.add_signal_handler(signal.SIGHUP, self._on_reload)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._loop is not None:
            for number in (*STOP_SIGNALS, signal.SIGHUP):
                self._loop.remove_signal_handler(number)

    def _on_stop(self, number: signal.Signals) -> None:
        if self.received is None:
            self.received = number
            log.info("stopping", signal=number.name, again="forces")
            self._stop()
        else:
            log.warning("forced", signal=number.name)
            self._force()

    def _on_reload(self) -> None:
        self._reload()
