from __future__ import annotations

import asyncio
import time

from broker.host.lag import LagMeter
from broker.metrics import REGISTRY


def observed() -> float:
    return REGISTRY.get_sample_value("cortex_loop_lag_seconds_count") or 0.0


async def test_a_blocked_loop_shows_and_a_stopped_meter_is_silent() -> None:
    meter = LagMeter(interval_s=0.001)
    before = observed()
    meter.start()
    meter.start()
    await asyncio.sleep(0)
    time.sleep(0.05)
    async with asyncio.timeout(5):
        while observed() == before:
            await asyncio.sleep(0.001)
    assert meter.take_worst() >= 0.04
    meter.stop()
    meter.stop()
    count = observed()
    await asyncio.sleep(0.01)
    assert observed() == count
