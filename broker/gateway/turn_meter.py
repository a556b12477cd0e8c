"""What the turns on a WebSocket of OpenAI's shape use, each told by the event that ends it, or estimated. Pure."""

from __future__ import annotations

import re

from broker.gateway.estimate import Text, tokens_in
from broker.gateway.meter import Usage, frame_usage, name_in

_BEGUN = re.compile(rb'"type"\s*:\s*"response\.')


class TurnMeter:
    """One socket; turns come one after the other."""

    __slots__ = ("_asked", "_began", "_text")

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._asked = 0
        self._began = False
        self._text = Text("openai")

    def asked(self, size: int) -> None:
        """So many bytes of the sandbox's have passed."""
        self._asked += size

    def heard(self, message: bytes) -> Usage | None:
        """A text message of the provider; what a turn used, if it ends one."""
        usage = frame_usage(message)
        if usage is None:
            self._began = self._began or _BEGUN.search(message) is not None
            self._text.add(message)
            self._text.add(b"\n")
            return None
        if usage.tokens is None and self._text.size:
            usage = self._estimated(usage.model)
        self._begin()
        return usage

    def left(self) -> Usage | None:
        """The socket is over; what a turn that had begun has used by now, None: there was none."""
        usage = self._estimated("") if self._began else None
        self._begin()
        return usage

    def _estimated(self, model: str) -> Usage:
        written = tokens_in(self._text.size)
        return Usage(
            model=model or name_in(self._text.model), input=tokens_in(self._asked), output=written, estimated=True
        )
