"""The answer of a call on its way to the sandbox: head and pieces of one read go out in one write."""

from __future__ import annotations

from collections.abc import Callable

from broker.gateway.cache import Recorded
from broker.gateway.downstream import Downstream, Nobody
from broker.gateway.framing import LAST_CHUNK, Body, chunk
from broker.gateway.heads import ResponseHead
from broker.gateway.meter import Meter
from broker.gateway.routes import response_head


class Outgoing:
    """``down`` is where it goes; ``begun``: it can no longer be another answer; ``first``: when its body began."""

    __slots__ = ("_chunked", "_clock", "_meter", "_out", "begun", "down", "first", "status")

    def __init__(self, down: Downstream, meter: Meter | None, clock: Callable[[], float]) -> None:
        self.down = down
        self.begun = False
        self.first: float | None = None
        self.status = 0
        self._meter = meter
        self._clock = clock
        self._chunked = False
        self._out: list[bytes] = []

    def interim(self, head: ResponseHead) -> None:
        """100 was answered here; anything else (102, 103) is the client's to read."""
        if head.status != 100:
            self._out.append(response_head(head, chunked=False, close=False))

    def head(self, head: ResponseHead, body: Body, method: bytes) -> None:
        """The final head."""
        self._chunked = not body.done and (head.chunked or body.ends_at_close)
        if head.status == 204:
            head.length, head.chunked = None, False
        chunked = self._chunked or (head.chunked and method == b"HEAD")
        self._begin(head, chunked)

    def recorded(self, answer: Recorded, *, metered: bool) -> None:
        """The head of an answer that is not got for this call alone."""
        if not metered:
            self._meter = None
        self._chunked = answer.length is None
        head = ResponseHead(
            answer.status, answer.reason, answer.headers, answer.length, False, True, None, frozenset()
        )  # fmt: skip
        self._begin(head, self._chunked)

    def _begin(self, head: ResponseHead, chunked: bool) -> None:
        self.begun = True
        self.status = head.status
        if self._meter is not None:
            self._meter.head(head.status, head.headers)
        self.down.touch()
        self._out.append(response_head(head, chunked=chunked, close=self.down.closing_soon))

    def body(self, pieces: list[bytes]) -> None:
        """More of its body."""
        if self.first is None:
            self.first = self._clock()
        if self._meter is not None:
            self._meter.body(pieces)
        self.down.touch()
        self._out += chunk(pieces) if self._chunked else pieces

    def end(self) -> None:
        """All of it was there; it goes out."""
        if self._chunked:
            self._out.append(LAST_CHUNK)
        self.flush()

    def flush(self) -> None:
        """Sends what is there."""
        out, self._out = self._out, []
        if out:
            self.down.send(out)

    def desert(self) -> None:
        """The sandbox is gone, others wait."""
        self.flush()
        self.down = Nobody()
