"""One relay's figures, kept as plain numbers and moved to the metrics now and then, not per message."""

from __future__ import annotations

import time

from broker.metrics import CLOSED, CONNECTIONS, FIRST_FRAME, LINK_VIOLATIONS, RELAY_BYTES, RELAY_FRAMES

_FRAMES_UP, _FRAMES_DOWN = RELAY_FRAMES.labels("to_agent"), RELAY_FRAMES.labels("to_client")
_BYTES_UP, _BYTES_DOWN = RELAY_BYTES.labels("to_agent"), RELAY_BYTES.labels("to_client")
# Peers choose close codes; the label takes only those that this broker knows.
_KNOWN = {1000, 1001, 1002, 1003, 1005, 1006, 1007, 1008, 1009, 1011, 1012, 1013}
_KNOWN |= {4400, 4401, 4403, 4408, 4409, 4429}


class Traffic:
    """``agent`` labels the time to first frame. ``timed_client``, ``timed_agent``: its two ends are seen.

    ``spoke_at``: when the last ``count`` found that the client had begun a data frame, monotonic.
    """

    __slots__ = (
        "_agent",
        "_asked_at",
        "_counted",
        "_frames_before",
        "_open",
        "spoke_at",
        "timed_agent",
        "timed_client",
    )

    def __init__(self, agent: str) -> None:
        self._agent = agent
        self._asked_at = 0.0
        self._frames_before = 0
        self._counted = (0, 0, 0, 0)
        self.spoke_at = time.monotonic()
        self.timed_client = False
        self.timed_agent = False
        self._open = False

    def opened(self) -> None:
        self._open = True
        CONNECTIONS.inc()

    def client_spoke(self, frames: int) -> None:
        """The client has begun ``frames`` data frames."""
        if frames and not self.timed_client:
            self.timed_client = True
            self._asked_at = time.monotonic()

    def agent_spoke(self, frames: int) -> None:
        """The agent has begun ``frames`` data frames; those before the client's first message do not count."""
        if not self.timed_client:
            self._frames_before = frames
        elif frames > self._frames_before and not self.timed_agent:
            self.timed_agent = True
            FIRST_FRAME.labels(self._agent).observe(time.monotonic() - self._asked_at)

    def violation(self) -> None:
        LINK_VIOLATIONS.labels("frame").inc()

    def count(self, *, up: tuple[int, int], down: tuple[int, int]) -> None:
        """``up``, ``down``: frames and bytes so far, to the agent and to the client."""
        now = (*up, *down)
        if up[0] != self._counted[0]:
            self.spoke_at = time.monotonic()
        for counter, new, old in zip(
            (_FRAMES_UP, _BYTES_UP, _FRAMES_DOWN, _BYTES_DOWN), now, self._counted, strict=True
        ):
            if new != old:
                counter.inc(new - old)
        self._counted = now

    def closed(self, code: int) -> None:
        if not self._open:
            return
        CONNECTIONS.dec()
        CLOSED.labels(str(code) if code in _KNOWN else "other").inc()
