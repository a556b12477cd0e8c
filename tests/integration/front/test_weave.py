"""Random traffic with holds, notices and pings in between: each message arrives whole, once and in order."""

from __future__ import annotations

import asyncio
import random

import pytest
from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.protocol import OPEN, Protocol
from websockets.server import ServerProtocol
from websockets.uri import parse_uri

from tests.integration.front.fakes import attached, house


class Reader:
    """Messages out of frames, checked by the websockets library."""

    def __init__(self, protocol: Protocol) -> None:
        self._protocol = protocol
        self._parts: list[bytes] = []
        self.messages: list[bytes] = []
        self.pongs: list[bytes] = []

    def feed(self, data: bytes) -> None:
        self._protocol.receive_data(data)
        assert self._protocol.parser_exc is None
        for event in self._protocol.events_received():
            assert isinstance(event, Frame)
            if event.opcode is Opcode.PONG:
                self.pongs.append(bytes(event.data))
            elif event.opcode in (Opcode.TEXT, Opcode.CONT):
                self._parts.append(bytes(event.data))
                if event.fin:
                    self.messages.append(b"".join(self._parts))
                    self._parts.clear()


def traffic(rng: random.Random, name: str, *, mask: bool) -> tuple[list[bytes], bytes]:
    """Messages and their frames: some in fragments, pings between them."""
    messages, out = [], b""
    for number in range(120):
        message = f"{name}{number}:".encode() + b"." * rng.choice([0, 1, 100, 200, 3000])
        messages.append(message)
        cut = rng.randrange(len(message))
        parts = [message] if rng.random() < 0.6 else [message[:cut], b"", message[cut:]]
        for index, part in enumerate(parts):
            fin = index == len(parts) - 1
            out += Frame(Opcode.CONT if index else Opcode.TEXT, part, fin).serialize(mask=mask)
            if rng.random() < 0.3:
                out += Frame(Opcode.PING, f"{name}{number}".encode()).serialize(mask=mask)
    return messages, out


@pytest.mark.parametrize("seed", range(4))
async def test_nothing_is_lost_doubled_or_torn(seed: int) -> None:
    rng = random.Random(seed)
    up, up_bytes = traffic(rng, "up", mask=True)
    down, down_bytes = traffic(rng, "down", mask=False)
    async with house() as here, attached(here, protocols="cortex.acp.v1") as (client, stream):
        relay = here.session.clients[0]
        to_client = Reader(ClientProtocol(parse_uri("ws://x/"), state=OPEN, max_size=None))
        to_agent = Reader(ServerProtocol(state=OPEN, max_size=None))
        notes: list[bytes] = []

        async def send(write: object, data: bytes) -> None:
            pos = 0
            while pos < len(data):
                size = rng.choice([1, 2, 5, 40, 700, 5000])
                write(data[pos : pos + size])  # type: ignore[operator]
                pos += size
                await asyncio.sleep(0)

        async def meddle() -> None:
            for number in range(40):
                relay.hold()
                await asyncio.sleep(0.001)
                notes.append(f"note{number}".encode())
                relay.notify(notes[-1])
                relay.release()
                await asyncio.sleep(0.002)

        async def read(source: asyncio.StreamReader, reader: Reader, wanted: int) -> None:
            while len(reader.messages) < wanted:
                reader.feed(await asyncio.wait_for(source.read(65_536), 10))

        await asyncio.gather(
            send(client.send, up_bytes),
            send(stream.send, down_bytes),
            meddle(),
            read(stream.reader, to_agent, len(up)),
            read(client.reader, to_client, len(down) + 40),
        )
        assert to_agent.messages == up
        assert [message for message in to_client.messages if message.startswith(b"down")] == down
        assert [message for message in to_client.messages if message.startswith(b"note")] == notes
        assert to_client.pongs
        assert all(pong.startswith(b"up") for pong in to_client.pongs)
