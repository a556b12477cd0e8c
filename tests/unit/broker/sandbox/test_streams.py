"""A stream has one owner at any time, or is closed."""

from __future__ import annotations

import asyncio
import socket

import pytest

from broker.sandbox.streams import IdleStreams


async def _give(*, closed: bool) -> tuple[IdleStreams, socket.socket]:
    """A stream that came in the very moment its taker gave up."""
    streams = IdleStreams(4, lambda kind: None)
    taker = asyncio.ensure_future(streams.wait())
    await asyncio.sleep(0)
    near, far = socket.socketpair()
    streams.put(near)
    if closed:
        streams.close(ConnectionError("gone"))
    taker.cancel()
    with pytest.raises(asyncio.CancelledError):
        await taker
    return streams, far


async def test_a_stream_whose_taker_gave_up_waits_for_the_next() -> None:
    streams, far = await _give(closed=False)
    assert len(streams) == 1
    streams.close(ConnectionError("gone"))
    assert far.recv(1) == b""
    far.close()


async def test_after_the_end_such_a_stream_is_closed() -> None:
    streams, far = await _give(closed=True)
    assert len(streams) == 0
    far.settimeout(1)
    assert far.recv(1) == b""
    far.close()


async def test_takers_hear_of_the_end() -> None:
    streams = IdleStreams(4, lambda kind: None)
    taker = asyncio.ensure_future(streams.wait())
    await asyncio.sleep(0)
    streams.close(ConnectionError("gone"))
    with pytest.raises(ConnectionError):
        await taker
    assert streams.waiting == 0
