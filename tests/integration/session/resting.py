"""Helpers for sessions that nobody uses."""

from __future__ import annotations

from broker.metrics import POOL_CLAIMS
from broker.session.sandbox import Sandbox
from broker.session.session import Session
from tests.integration.session.rig import Client, Rig

DAY = 86_400.0


def state_of(session: Session) -> str:
    """Its state of now; a type checker would take what was seen once for lasting."""
    return session.state


def claims(result: str = "hit") -> float:
    return float(POOL_CLAIMS.labels("user", result)._value.get())


def box_of(session: Session) -> Sandbox:
    box = session._custody.box
    assert box is not None
    return box


async def attached(world: Rig, session: Session) -> Client:
    """A client that has its stream and has said something."""
    client = Client()
    session.attach(client)
    (await session.open_stream(client.attach)).close()
    client.spoke_at = world.steady()
    return client


async def turns(world: Rig, session: Session, number: int) -> None:
    """So many turns, one after the other, at once."""
    world.box.turns += number
    await box_of(session).link.probe()


async def paused(world: Rig) -> Session:
    session = await world.ready()
    await world.passes(60)
    assert state_of(session) == "paused"
    return session
