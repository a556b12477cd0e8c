"""What a call to a model used, read out of the answer as it passes. Pure.

Whatever the provider's shape, ``Usage`` means the same:

- ``input``: all tokens of the prompt, those read from or written to the provider's cache included;
- ``cache_read``, ``cache_write``: how many of ``input`` these were, which the provider charges at other prices;
- ``output``: all tokens that the model made, those it thought with included;
- ``reasoning``: how many of ``output`` these were.

=========== ================================================ =========================== ============================
            input                                            cache_read / cache_write    output / reasoning
=========== ================================================ =========================== ============================
Anthropic   input + cache_read_input + cache_creation_input  the latter two              output_tokens / not said
OpenAI      input_tokens or prompt_tokens                    cached_tokens / not said    output_tokens or
                                                                                         completion_tokens /
                                                                                         reasoning_tokens
Gemini      promptTokenCount + toolUsePromptTokenCount       cachedContentTokenCount /   candidates- +
                                                             not said                    thoughtsTokenCount / the latter
Ollama      prompt_eval_count                                not said                    eval_count / not said
=========== ================================================ =========================== ============================

Of a stream the last figures count, as each provider's are running totals; Anthropic's ``message_delta`` leaves
out what ``message_start`` has said. Counting tokens (``Endpoint.COUNT``) uses none. Of an answer that says nothing,
since it was not asked to or was broken off, tokens are estimated by the size of the request and of the text.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from typing import Any

import msgspec

from broker.gateway.caller import Endpoint, last_of, model_in
from broker.gateway.estimate import Text, tokens_in
from broker.gateway.heads import Headers
from broker.gateway.policy import Kind

MODEL_WITHIN = 4096
"""Bytes at the start of a request in which its model is looked for."""
MAX_MODEL = 100
MAX_KEPT = 2**20
"""Bytes of one answer or event that are kept; of a longer one only the last ``TAIL`` are."""
TAIL = 64 * 2**10
MAX_INFLATED = 64 * 2**20
MAX_COUNT = 2**53

_MODEL_FIRST = re.compile(rb'\s*\{\s*"model"\s*:\s*("(?:[^"\\]|\\.)*")')
_MODEL = re.compile(rb'"model"\s*:\s*("(?:[^"\\]|\\.)*")')
_NAMED = b'"model"'
_DATED = re.compile(r"(-\d{4}-?\d{2}-?\d{2})?")
"""What providers put behind the name that was asked for."""
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"')
_NOTHING = re.compile(rb'"usage"\s*:\s*null')
_FINAL = re.compile(rb'"type"\s*:\s*"response\.(?:completed|incomplete|failed|done)"')
_NEEDLES: dict[Kind, bytes] = {
    "anthropic": b'"usage"',
    "openai": b'"usage"',
    "gemini": b'"usageMetadata"',
    "ollama": b'eval_count"',
}
_SHAPES: dict[bytes, Kind] = {
    b"messages": "anthropic",
    b"responses": "openai",
    b"completions": "openai",
    b"embeddings": "openai",
    b"compact": "openai",
}
"""Ollama and Gemini have faces of other shapes; the path tells."""


class Usage(msgspec.Struct, kw_only=True):
    """None: the provider did not say; ``model`` "": neither did the request. ``estimated``: some of it is."""

    model: str = ""
    input: int | None = None
    output: int | None = None
    cache_read: int | None = None
    cache_write: int | None = None
    reasoning: int | None = None
    estimated: bool = False

    @property
    def tokens(self) -> int | None:
        """Input and output together."""
        return None if self.input is None and self.output is None else (self.input or 0) + (self.output or 0)


class _Inner(msgspec.Struct):
    model: Any = None
    usage: Any = None
    usageMetadata: Any = None
    modelVersion: Any = None


class _Answer(msgspec.Struct):
    """An answer or event of any shape; all that is not named here is skipped unread. ``message`` is where
    Anthropic's stream begins, ``response`` where OpenAI's ends and what Code Assist wraps; Ollama's is a text."""

    model: Any = None
    usage: Any = None
    usageMetadata: Any = None
    modelVersion: Any = None
    prompt_eval_count: Any = None
    eval_count: Any = None
    message: _Inner | str | None = None
    response: _Inner | str | None = None


_ONE = msgspec.json.Decoder(_Answer)
_MANY = msgspec.json.Decoder(list[_Answer])


class Meter:
    """One call: ``request`` and ``body`` as they pass, ``head`` in between, then ``finish``. How the bytes are
    cut makes no difference. ``unread``: the answer is compressed in a way that is not read, so it says nothing."""

    __slots__ = (
        "_answered", "_asked", "_asked_size", "_edge", "_endpoint", "_first", "_inflate", "_inflated", "_json",
        "_kept", "_last", "_lines", "_model", "_named", "_needle", "_passed", "_reading", "_requested_size", "_shape",
        "_size", "_text", "_twice", "_whole", "unread",
    )  # fmt: skip

    def __init__(self, kind: Kind, endpoint: Endpoint, target: bytes) -> None:
        self.unread = False
        self._endpoint = endpoint
        self._model = model_in(target)
        self._shape: Kind = _SHAPES.get(last_of(target).lower(), kind)
        self._needle = _NEEDLES[self._shape]
        self._asked: list[bytes] = []
        self._asked_size = 0
        self._requested_size = 0
        self._answered = False
        self._edge = b""
        self._named = 0
        self._twice = False
        self._reading = False
        self._lines = False
        self._json = True
        self._inflate: zlib._Decompress | None = None
        self._inflated = 0
        self._kept: list[bytes] = []
        self._size = 0
        self._whole = True
        self._first: tuple[bytes, bool] | None = None
        self._last: tuple[bytes, bool] | None = None
        self._text = Text(self._shape)
        self._passed = 0
        """Bytes of the answer that nothing was read out of."""

    def request(self, pieces: list[bytes]) -> None:
        """Body of the request, as it passes."""
        for piece in pieces:
            self._requested_size += len(piece)
            if not self._twice:
                self._look_for_another(piece)
            if self._asked_size >= MODEL_WITHIN:
                continue
            piece = piece[: MODEL_WITHIN - self._asked_size]
            self._asked.append(piece)
            self._asked_size += len(piece)

    def _look_for_another(self, piece: bytes) -> None:
        """JSON lets a name be there twice, and escaped: servers take the last one, whatever was said first."""
        seen = self._edge + piece
        self._named += seen.count(_NAMED)
        self._twice = self._named > 1 or b"\\u006" in seen
        # What is cut between two pieces is whole in the next look; what is whole was counted.
        self._edge = seen[-(len(_NAMED) - 1) :]

    def head(self, status: int, headers: Headers) -> None:
        """Of the answer. Errors use nothing; an answer compressed other than by gzip or deflate is not read."""
        self._answered = self._reading = 200 <= status < 300 and self._endpoint.metered
        if not self._reading:
            return
        for name, value in headers:
            match name.lower():
                case b"content-type":
                    kind = value.lower()
                    self._lines = b"event-stream" in kind or b"ndjson" in kind or b"jsonl" in kind
                    self._json = b"json" in kind
                case b"content-encoding":
                    coding = value.strip().lower()
                    if coding in (b"gzip", b"x-gzip", b"deflate"):
                        self._inflate = zlib.decompressobj(zlib.MAX_WBITS | 32)
                    elif coding not in (b"", b"identity"):
                        self._give_up()

    def body(self, pieces: list[bytes]) -> None:
        """Body of the answer, as it passes. Never raises, whatever is in it."""
        if not self._reading:
            self._passed += sum(map(len, pieces))
            return
        if self._inflate is not None:
            packed, pieces = pieces, self._plain(pieces)
            if not self._reading:
                self._passed += sum(map(len, packed))
        for piece in pieces:
            if not self._lines:
                self._keep(piece)
                continue
            self._text.add(piece)
            if not self._size and piece.endswith(b"\n"):
                # Nearly every piece is a whole event that says nothing of usage.
                if self._needle in piece:
                    self._scan(piece)
            else:
                self._cut(piece)

    def finish(self) -> Usage:
        """What was used. ``model`` is the request's word, where it came early, else the answer's."""
        if self._size:
            rest, self._kept, self._size = b"".join(self._kept), [], 0
            if self._lines:
                before = self._last
                self._scan(rest)
                if before and self._last and not _read(*self._last, self._needle)[1]:
                    # Broken off within an event: what was said before holds.
                    self._last = before
            else:
                self._last = (rest, self._whole)
        counts: dict[str, Any] = {}
        model = ""
        # What a stream of Anthropic's begins with holds until it is said again; of others only the last word does.
        for kept in (self._first, self._last) if self._shape == "anthropic" else (self._last,):
            if kept is not None:
                named, found = _read(*kept, self._needle)
                model = named or model
                counts |= {key: value for key, value in found.items() if value is not None}
        usage = _usage(self._shape, "", counts)
        if self._answered and (usage.tokens is None or self._broken_off()):
            self._estimate(usage)
            model = model or name_in(self._text.model)
        usage.model = self._model or self._believed(self._requested(), model)
        return usage

    # -- what nobody has said

    def _broken_off(self) -> bool:
        """A stream of Anthropic's has said what was asked, and not yet what was made."""
        if self._shape != "anthropic" or self._last is None or self._last is not self._first:
            return False
        return b'"message_start"' in self._last[0]

    def _estimate(self, usage: Usage) -> None:
        if usage.input is None:
            usage.input = tokens_in(self._requested_size)
            usage.estimated = True
        if self._endpoint is Endpoint.EMBED:
            return
        if not self._lines and self._last is not None:
            if self._json:
                self._text.add(self._last[0])
            else:
                self._passed += len(self._last[0])
        written = tokens_in(self._text.size + self._passed)
        if written > (usage.output or 0):
            usage.output = written
            usage.estimated = True

    # -- the request

    def _believed(self, asked: str, answered: str) -> str:
        """The request's word, which prices know, unless the request may have two and the answer says otherwise."""
        if not asked or (self._twice and answered and not _DATED.fullmatch(answered.removeprefix(asked))):
            return answered
        return asked

    def _requested(self) -> str:
        text = b"".join(self._asked)
        found = _MODEL_FIRST.match(text)
        if found is None:
            for found in _MODEL.finditer(text):
                if _depth(text[: found.start()]) == 1:
                    break
            else:
                return ""
        return name_in(found[1])

    # -- the answer

    def _keep(self, piece: bytes) -> None:
        self._kept.append(piece)
        self._size += len(piece)
        if self._size > MAX_KEPT:
            tail = b"".join(self._kept)[-TAIL:]
            if not self._lines:
                self._passed += self._size - TAIL
            self._kept, self._size, self._whole = [tail], len(tail), False

    def _cut(self, piece: bytes) -> None:
        """A piece that does not end where an event does, or the end of such an event."""
        at = piece.rfind(b"\n") + 1
        if at:
            self._keep(piece[:at])
            whole, self._kept, self._size = b"".join(self._kept), [], 0
            if self._needle in whole:
                self._scan(whole)
            self._whole = True
        if at < len(piece):
            self._keep(piece[at:])

    def _scan(self, text: bytes) -> None:
        """Whole lines; the first may be a tail."""
        whole, self._whole = self._whole, True
        for line in text.splitlines():
            if self._needle in line and line.count(self._needle) > len(_NOTHING.findall(line)):
                self._last = (line.removeprefix(b"data:").strip(), whole)
                if self._first is None:
                    self._first = self._last
            whole = True

    def _plain(self, pieces: list[bytes]) -> list[bytes]:
        """Inflated; nothing more once it is malformed or too much."""
        plain: list[bytes] = []
        assert self._inflate is not None
        try:
            for piece in pieces:
                while piece and self._reading:
                    made = self._inflate.decompress(piece, MAX_KEPT)
                    piece = self._inflate.unconsumed_tail
                    self._inflated += len(made)
                    if self._inflated > MAX_INFLATED:
                        self._give_up()
                    if made:
                        plain.append(made)
        except zlib.error:
            self._give_up()
        return plain

    def _give_up(self) -> None:
        self._reading = False
        self.unread = True


def frame_usage(frame: bytes | str) -> Usage | None:
    """What a turn used, out of the event that ends it on a Responses WebSocket (``response.completed``, ``incomplete``,
    ``failed``, or ``done`` of a realtime one); None for all other messages. One of over ``MAX_KEPT`` bytes is read at
    its end only."""
    text = frame.encode() if isinstance(frame, str) else frame
    if b'"response.' not in text or not _FINAL.search(text):
        return None
    whole = len(text) <= MAX_KEPT
    model, counts = _read(text if whole else text[-TAIL:], whole, b'"usage"')
    return _usage("openai", model, counts)


def _depth(text: bytes) -> int:
    """How many objects and arrays are open at the end of ``text``."""
    bare = _STRING.sub(b"", text)
    return bare.count(b"{") + bare.count(b"[") - bare.count(b"}") - bare.count(b"]")


def name_in(text: bytes) -> str:
    """The name in a JSON string, as it may be shown; "" for anything else."""
    return _name(_json(text))


def _json(text: bytes) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return None


def _name(value: Any) -> str:
    """What any sandbox can choose goes to logs, labels and terminals: nothing there that is not to be seen."""
    text = value[:MAX_MODEL] if isinstance(value, str) else ""
    return text if text.isprintable() else "".join(each if each.isprintable() else "\ufffd" for each in text)


def _read(text: bytes, whole: bool, needle: bytes) -> tuple[str, dict[str, Any]]:
    """Model and counts in one answer or event; in the tail of one: what follows the last mention."""
    if not whole:
        return "", _after_last(text, needle)
    try:
        answers = _MANY.decode(text) if text.lstrip()[:1] == b"[" else [_ONE.decode(text)]
    except (msgspec.DecodeError, RecursionError):
        # Malformed, or an array that was cut short.
        return "", _after_last(text, needle)
    for answer in reversed(answers):
        inner = next((each for each in (answer.message, answer.response) if isinstance(each, _Inner)), _Inner())
        counts = answer.usage or answer.usageMetadata or inner.usage or inner.usageMetadata
        if answer.eval_count is not None or answer.prompt_eval_count is not None:
            counts = {"prompt_eval_count": answer.prompt_eval_count, "eval_count": answer.eval_count}
        model = answer.model or answer.modelVersion or inner.model or inner.modelVersion
        if isinstance(counts, dict):
            return _name(model), counts
    return _name(answers[-1].model) if answers else "", {}


def _after_last(text: bytes, needle: bytes) -> dict[str, Any]:
    """The object that the last ``needle`` names; of Ollama's shape: the numbers themselves."""
    if needle == _NEEDLES["ollama"]:
        return {
            found[1].decode(): int(found[2])
            for found in re.finditer(rb'"((?:prompt_)?eval_count)"\s*:\s*(\d{1,15})(?!\d)', text)
        }
    at = -1
    # What a sandbox gives a name of its own, such as a label, may come behind.
    for match in re.finditer(re.escape(needle) + rb"\s*:\s*\{", text):
        at = match.end() - 1
    if at < 0:
        return {}
    try:
        found, _ = json.JSONDecoder().raw_decode(text[at:][:TAIL].decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _usage(shape: Kind, model: str, counts: Mapping[str, Any]) -> Usage:
    match shape:
        case "anthropic":
            read, write = (_count(counts, f"cache_{what}_input_tokens") for what in ("read", "creation"))
            fresh = _count(counts, "input_tokens")
            return Usage(
                model=model,
                input=_sum(fresh, read, write),
                output=_count(counts, "output_tokens"),
                cache_read=read,
                cache_write=write,
            )
        case "openai":
            asked = counts.get("input_tokens_details") or counts.get("prompt_tokens_details")
            made = counts.get("output_tokens_details") or counts.get("completion_tokens_details")
            return Usage(
                model=model,
                input=_count(counts, "input_tokens", "prompt_tokens"),
                output=_count(counts, "output_tokens", "completion_tokens"),
                cache_read=_count(asked, "cached_tokens"),
                reasoning=_count(made, "reasoning_tokens"),
            )
        case "gemini":
            thought = _count(counts, "thoughtsTokenCount")
            return Usage(
                model=model,
                input=_sum(_count(counts, "promptTokenCount"), _count(counts, "toolUsePromptTokenCount")),
                output=_sum(_count(counts, "candidatesTokenCount"), thought),
                cache_read=_count(counts, "cachedContentTokenCount"),
                reasoning=thought,
            )
        case "ollama":
            return Usage(model=model, input=_count(counts, "prompt_eval_count"), output=_count(counts, "eval_count"))


def _count(counts: Any, *names: str) -> int | None:
    """The first of ``names`` that has a plausible number."""
    if isinstance(counts, Mapping):
        for name in names:
            value = counts.get(name)
            if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_COUNT:
                return value
    return None


def _sum(*counts: int | None) -> int | None:
    said = [count for count in counts if count is not None]
    return sum(said) if said else None
