from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import uvloop

from broker.sandbox.slots import Slots
from broker.sandbox.sockets import SlotSockets

LoopFactory = Callable[[], asyncio.AbstractEventLoop]


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> Mapping[str, LoopFactory]:
    """The link runs under both loops."""
    if item.path.stem in ("test_link", "test_link_hostile"):
        return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
    return {"asyncio": asyncio.new_event_loop}


@pytest.fixture
def sockets(tmp_path: Path) -> Iterator[SlotSockets]:
    slots = Slots(tmp_path / "s", uid=os.geteuid())
    slots.check()
    made = SlotSockets(slots.create(slots.new_id()), gid=os.getegid())
    made.open()
    yield made
    made.close()
