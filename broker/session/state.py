"""The life of a session as a pure state machine.

    stopped → starting → ready ⇄ paused → stopping → stopped
                  └──────────┴───────┴──→ failed → starting | stopping

``advance`` is the only way from one state to the next; what has to be done on the way is the
actor's business.
"""

from __future__ import annotations

from enum import Enum

from broker.session.port import State


class Event(Enum):
    """What moves a session."""

    WANTED = "wanted"
    """Somebody needs it: a client, a hook, a prompt."""
    ADOPTED = "adopted"
    """A sandbox of its own was found running after a restart of the broker."""
    READY = "ready"
    """Configuration acknowledged and the agent's initialize answer held."""
    PAUSE = "pause"
    RESUME = "resume"
    STOP = "stop"
    """Asked to stop, or its sandbox is known to be dead and what it held is being put away."""
    STOPPED = "stopped"
    FAILED = "failed"


_NEXT: dict[tuple[State, Event], State] = {
    ("stopped", Event.WANTED): "starting",
    ("stopped", Event.ADOPTED): "starting",
    ("stopped", Event.STOP): "stopping",
    ("failed", Event.WANTED): "starting",
    ("failed", Event.STOP): "stopping",
    ("starting", Event.READY): "ready",
    ("starting", Event.STOP): "stopping",
    ("starting", Event.FAILED): "failed",
    ("ready", Event.PAUSE): "paused",
    ("ready", Event.STOP): "stopping",
    ("ready", Event.FAILED): "failed",
    ("paused", Event.RESUME): "ready",
    ("paused", Event.STOP): "stopping",
    ("paused", Event.FAILED): "failed",
    ("stopping", Event.STOPPED): "stopped",
    ("stopping", Event.FAILED): "failed",
}


class IllegalMove(Exception):
    """An event that the state does not allow."""

    def __init__(self, state: State, event: Event) -> None:
        super().__init__(f"a {state} session cannot take {event.value}")
        self.state = state
        self.event = event


def allowed(state: State, event: Event) -> bool:
    """Whether ``event`` leads anywhere from ``state``."""
    return (state, event) in _NEXT


def advance(state: State, event: Event) -> State:
    """The next state. Raises ``IllegalMove``."""
    try:
        return _NEXT[state, event]
    except KeyError:
        raise IllegalMove(state, event) from None


def wants_bringup(state: State) -> bool:
    """A client that comes in this state needs a bring-up to be started."""
    return state in ("stopped", "failed")
