"""About how many tokens something is, where no provider has said. Pure."""

from __future__ import annotations

import re

from broker.gateway.policy import Kind

BYTES_PER_TOKEN = 4
AT_ONCE = 16 * 2**10
"""Bytes that are looked at together; of answers that are shorter, and say what they used, none are."""

_STRING = rb'"\s*:\s*"([^"\\]*(?:\\.[^"\\]*)*)'
_WRITTEN = re.compile(
    rb'"(delta|content|text|thinking|reasoning|reasoning_content|refusal|arguments|partial_json|response)' + _STRING,
    re.DOTALL,
)
"""Where the shapes of OpenAI, Anthropic and Ollama have what a model writes."""
_ANY = re.compile(rb"()" + _STRING, re.DOTALL)
"""Gemini's arguments of functions have names of their own; little else in its answers is text."""
_DELTA = b"delta"
_MODEL = re.compile(rb'"model"\s*:\s*("[^"\\]*(?:\\.[^"\\]*)*")')


def tokens_in(size: int) -> int:
    """Of ``size`` bytes of text or JSON."""
    return size // BYTES_PER_TOKEN


class Text:
    """What a model writes, out of the events or the whole answer in which it comes."""

    __slots__ = ("_deltas", "_model", "_pattern", "_pieces", "_rest", "_size")

    def __init__(self, shape: Kind) -> None:
        self._pattern = _ANY if shape == "gemini" else _WRITTEN
        self._pieces: list[bytes] = []
        self._size = 0
        self._deltas = 0
        self._rest = 0
        self._model = b""

    def add(self, piece: bytes) -> None:
        """More of the answer."""
        self._pieces.append(piece)
        self._size += len(piece)
        if self._size >= AT_ONCE:
            self._look(whole=False)

    @property
    def size(self) -> int:
        """Bytes of it, as JSON spells them."""
        self._look(whole=True)
        # OpenAI's Responses say at the end of each part again what their deltas have said.
        return self._deltas or self._rest

    @property
    def model(self) -> bytes:
        """The first name of a model in the answer, as a JSON string; b"": none."""
        self._look(whole=True)
        return self._model

    def _look(self, *, whole: bool) -> None:
        text = b"".join(self._pieces)
        # An event is not torn, but for one that is long.
        end = len(text) if whole else text.rfind(b"\n") + 1 or len(text)
        self._pieces, self._size = [text[end:]], len(text) - end
        for name, written in self._pattern.findall(text[:end]):
            if name == _DELTA:
                self._deltas += len(written)
            else:
                self._rest += len(written)
        if not self._model:
            found = _MODEL.search(text, 0, end)
            self._model = found[1] if found else b""
