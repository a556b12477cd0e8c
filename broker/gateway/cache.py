"""Which requests may share an answer, under which key, and what of an answer is kept. Pure.

Two requests are equal when they go to the same provider with the same credential, ask for the same thing
and their JSON bodies differ in white space and the order of keys at most (``stream`` is part of the body).
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

import msgspec

from broker.gateway.caller import Endpoint, model_in
from broker.gateway.heads import Headers, ResponseHead
from broker.gateway.policy import CacheRule
from broker.gateway.routes import ACCOUNTS, strip_keys

OVERHEAD = 512
"""What an entry takes beside its bytes: objects of Python's, the key, the place in the table."""
PIECE_OVERHEAD = 48
_VERSION = b"cortex-1"
_POSTS = frozenset((Endpoint.GENERATE, Endpoint.EMBED, Endpoint.COUNT))

_CHANGE_ANSWERS = ACCOUNTS | {
    b"accept", b"accept-encoding", b"accept-language", b"anthropic-version", b"content-type", b"content-encoding",
    b"openai-version",
}  # fmt: skip
_LISTS = frozenset((b"accept-encoding", b"anthropic-beta", b"openai-beta"))
"""Of these the order does not matter."""
_CONDITIONAL = frozenset(
    (b"range", b"if-match", b"if-none-match", b"if-modified-since", b"if-unmodified-since", b"if-range")
)
_DIRECTIVES = frozenset((b"cache-control", b"pragma"))
_FRESH = re.compile(rb"no-cache|no-store", re.IGNORECASE)
_KEPT = frozenset((b"content-type", b"content-encoding", b"content-language", b"cache-control", b"x-accel-buffering"))
"""Headers that describe the body. The others are about one call: ids, cookies, rate limits, times."""

_TOOLS = ("tools", "functions", "mcp_servers", "web_search_options", "plugins", "container")
_STATE = ("previous_response_id", "conversation", "background", "cachedContent", "cached_content", "context")
"""The answer depends on what the provider keeps, or changes it."""
_COUNTS = ("n", "best_of", "num_return_sequences")


@dataclass(slots=True)
class Recorded:
    """An answer to give again. ``headers``: without hop-by-hop and content-length; ``chunked``: a stream, replayed
    piece by piece; ``length``: of the body where that is known and it is no stream."""

    status: int
    reason: bytes
    headers: Headers
    pieces: list[bytes]
    chunked: bool
    length: int | None = None

    def marked(self, how: bytes, age_s: float | None = None) -> Recorded:
        """The same with ``x-cortex-cache: HOW``, and ``age`` (RFC 9111 section 5.1) where it was kept."""
        extra = [(b"x-cortex-cache", how)]
        if age_s is not None:
            extra.append((b"age", b"%d" % max(0, age_s)))
        return replace(self, headers=[*self.headers, *extra])

    @property
    def cost(self) -> int:
        """Bytes of memory, about."""
        size = OVERHEAD + sum(len(name) + len(value) + 2 * PIECE_OVERHEAD for name, value in self.headers)
        return size + sum(map(len, self.pieces)) + PIECE_OVERHEAD * len(self.pieces)


def recorded(head: ResponseHead) -> Recorded:
    """The beginning of an answer that goes to more than the one who asked."""
    chunked = head.chunked or head.length is None
    return Recorded(head.status, head.reason, kept(head.headers), [], chunked, None if chunked else head.length)


def kept(headers: Headers) -> Headers:
    """Those that others than the one who asked may see, later too."""
    return [(name, value) for name, value in headers if name.lower() in _KEPT]


def wants(rule: CacheRule, endpoint: Endpoint, method: bytes) -> bool:
    """Worth looking at the body."""
    return rule.enabled and (
        method == b"POST" if endpoint in _POSTS else endpoint is Endpoint.LIST and method == b"GET"
    )


def ttl_s(rule: CacheRule, endpoint: Endpoint) -> float:
    """How long an answer is kept."""
    return rule.list_ttl_s if endpoint is Endpoint.LIST else rule.ttl_s


def asked(rule: CacheRule, endpoint: Endpoint, method: bytes, target: bytes, body: bytes) -> bytes | None:
    """What is asked, whoever asks; None: not to be shared."""
    path, question, query = target.partition(b"?")
    target = path + question + strip_keys(query)
    if endpoint is Endpoint.LIST:
        return digest(method, target) if method == b"GET" and not body else None
    if endpoint not in _POSTS or method != b"POST":
        return None
    try:
        value = msgspec.json.decode(body)
    except (ValueError, RecursionError):
        return None
    # Most bodies of agents offer tools; those are not worth spelling.
    if not isinstance(value, dict) or not may_share(rule, endpoint, target, value):
        return None
    text = _spelled(value, body)
    return None if text is None else digest(method, target, text)


def digest(*parts: bytes) -> bytes:
    """SHA-256 over ``parts``, none of which can run into the next."""
    summed = sha256(_VERSION)
    for part in parts:
        summed.update(b"%d:" % len(part))
        summed.update(part)
    return summed.digest()


def canonical(body: bytes) -> tuple[Any, bytes] | None:
    """The JSON value and its one spelling; None where two readers could differ about it, or it is none."""
    try:
        value = msgspec.json.decode(body)
    except (ValueError, RecursionError):
        return None
    text = _spelled(value, body)
    return None if text is None else (value, text)


def _spelled(value: Any, body: bytes) -> bytes | None:
    """The one spelling of ``value``, decoded from ``body``; None where a key is there twice: who asks could have
    one value answered and the other one looked up."""
    try:
        text = msgspec.json.encode(value)
        # What most clients send is spelled like this already, so no key was lost; counting costs ten times as much.
        if text != body and _members(text) != _members(body):
            return None
        return msgspec.json.encode(value, order="sorted")
    except (ValueError, OverflowError, RecursionError):
        return None


def _members(text: bytes) -> int:
    """Members of all objects in valid JSON: colons outside strings."""
    bare = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    return b"".join(bare.split(b'"')[::2]).count(b":")


def said(headers: Headers) -> list[bytes] | None:
    """The headers that change answers; None: the client wants no stored answer, or a part of one."""
    found: dict[bytes, list[bytes]] = {}
    for name, value in headers:
        low = name.lower()
        if low in _CHANGE_ANSWERS or low in _LISTS:
            found.setdefault(low, []).append(value.strip())
        elif low in _CONDITIONAL or (low in _DIRECTIVES and _FRESH.search(value)):
            return None
    parts: list[bytes] = []
    for low in sorted(found):
        values: Iterable[bytes] = found[low]
        if low in _LISTS:
            values = sorted({part.strip() for value in values for part in value.split(b",")})
        parts += (low, b",".join(values))
    return parts


# -- rules


def may_share(rule: CacheRule, endpoint: Endpoint, target: bytes, body: Mapping[str, Any]) -> bool:
    """Nothing in the request makes its answer one that must not be given twice."""
    inner = body.get("request", body) if b":" in target.rpartition(b"/")[2] else body
    if not isinstance(inner, dict) or not _names_model(target, body):
        return False
    if any(inner.get(key) for key in _STATE):
        return False
    if endpoint is not Endpoint.GENERATE:
        # Counting and embedding take the same numbers each time, and call no tool.
        return True
    if not rule.with_tools and any(inner.get(key) for key in _TOOLS):
        return False
    return rule.with_randomness or not _random(target, inner)


def _names_model(target: bytes, body: Mapping[str, Any]) -> bool:
    """Without a model it is another kind of call that ends in the same word, such as a message to a thread."""
    model = body.get("model")
    return bool(model_in(target)) or (isinstance(model, str) and bool(model))


def _random(target: bytes, body: Mapping[str, Any]) -> bool:
    """Asking again could bring another answer. Every provider's default temperature is above 0 (Anthropic, OpenAI
    and Gemini 1, Ollama 0.8), so one that is not given is none; a seed is a best effort for most, and not looked at."""
    options = _sampling(target, body)
    temperature = options.get("temperature")
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or temperature != 0:
        return True
    several = [options.get(key) for key in ("candidateCount", "candidate_count")] + [body.get(key) for key in _COUNTS]
    return any(count not in (None, 1) for count in several)


def _sampling(target: bytes, body: Mapping[str, Any]) -> Mapping[str, Any]:
    """Where the shape of this endpoint has its temperature."""
    path = target.partition(b"?")[0]
    options: Any = body
    if b":" in path.rpartition(b"/")[2]:
        both = [body[key] for key in ("generationConfig", "generation_config") if key in body]
        options = both[0] if len(both) == 1 else None
    elif path.endswith((b"/api/chat", b"/api/generate")):
        options = body.get("options")
    return options if isinstance(options, dict) else {}


# -- memory


class Lru:
    """Answers by key within ``max_bytes``; the least used go first. Times are seconds of one clock."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.size = 0
        self._entries: OrderedDict[bytes, tuple[Recorded, float, float, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, key: bytes, answer: Recorded, now: float, ttl: float) -> bool:
        """False: it is larger than all there is room for."""
        self.drop(key)
        cost = answer.cost
        if cost > self.max_bytes:
            return False
        while self.size + cost > self.max_bytes:
            self.drop(next(iter(self._entries)))
        self._entries[key] = (answer, now, now + ttl, cost)
        self.size += cost
        return True

    def get(self, key: bytes, now: float) -> tuple[Recorded, float] | None:
        """The answer and its age."""
        found = self._entries.get(key)
        if found is None:
            return None
        answer, since, until, _ = found
        if now >= until:
            self.drop(key)
            return None
        self._entries.move_to_end(key)
        return answer, now - since

    def drop(self, key: bytes) -> None:
        found = self._entries.pop(key, None)
        if found is not None:
            self.size -= found[3]
