from __future__ import annotations

import asyncio
import os
import signal

from broker.host.signals import Signals


async def test_first_stops_second_forces_hangup_reloads() -> None:
    seen: list[str] = []
    arrived = asyncio.Event()

    def note(what: str) -> None:
        seen.append(what)
        arrived.set()

    async def send(number: signal.Signals) -> None:
        arrived.clear()
        os.kill(os.getpid(), number)
        await asyncio.wait_for(arrived.wait(), 5)

    before = signal.getsignal(signal.SIGINT)
    with Signals(stop=lambda: note("stop"), force=lambda: note("force"), reload=lambda: note("reload")) as signals:
        await send(signal.SIGHUP)
        assert signals.received is None
        await send(signal.SIGTERM)
        await send(signal.SIGINT)
        assert signals.received is signal.SIGTERM
    assert seen == ["reload", "stop", "force"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)
