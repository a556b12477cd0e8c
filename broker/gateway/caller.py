"""Who makes a call and what is asked, as limits, cache and accounting see it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from urllib.parse import unquote_to_bytes


@dataclass(frozen=True, slots=True)
class Caller:
    """The sandbox behind a call; ``team`` may be ""."""

    slot: str
    user: str
    team: str = ""
    workspace: str = ""
    agent: str = ""

    @classmethod
    def of(cls, slot: str, identity: Mapping[str, str]) -> Caller:
        """From what the broker said of the slot."""
        return cls(slot, *(identity.get(key, "") for key in ("user", "team", "workspace", "agent")))


class Endpoint(Enum):
    """What is asked of a provider, whatever its shape. OTHER is passed on like the rest."""

    GENERATE = "generate"
    """A model answers: messages, responses, chat completions, generateContent, Ollama's chat and generate."""
    EMBED = "embed"
    COUNT = "count"
    """Tokens are counted, nothing is generated."""
    LIST = "list"
    """Models and the like."""
    OTHER = "other"

    @property
    def metered(self) -> bool:
        """Its answers say what they used, and are read for it."""
        return self in (Endpoint.GENERATE, Endpoint.EMBED)


_LAST = {
    b"messages": Endpoint.GENERATE,
    b"responses": Endpoint.GENERATE,
    b"compact": Endpoint.GENERATE,
    b"completions": Endpoint.GENERATE,
    b"generatecontent": Endpoint.GENERATE,
    b"streamgeneratecontent": Endpoint.GENERATE,
    b"chat": Endpoint.GENERATE,
    b"generate": Endpoint.GENERATE,
    b"embeddings": Endpoint.EMBED,
    b"embed": Endpoint.EMBED,
    b"embedcontent": Endpoint.EMBED,
    b"batchembedcontents": Endpoint.EMBED,
    b"count_tokens": Endpoint.COUNT,
    b"counttokens": Endpoint.COUNT,
    b"input_tokens": Endpoint.COUNT,
}
_LISTS = (b"/models", b"/api/tags", b"/v1beta/models")


def endpoint_of(method: bytes, target: bytes) -> Endpoint:
    """What ``target`` (its query may be there) asks for."""
    path = target.partition(b"?")[0]
    if method == b"POST":
        return _LAST.get(last_of(target).rpartition(b":")[2].lower(), Endpoint.OTHER)
    if method in (b"GET", b"HEAD") and (path.endswith(_LISTS) or b"/models/" in path):
        return Endpoint.LIST
    return Endpoint.OTHER


def last_of(target: bytes) -> bytes:
    """The last segment of a path, as the most lenient server may read it: who spells it oddly is metered too."""
    path = target.partition(b"?")[0]
    if b"%" in path:
        path = unquote_to_bytes(path)
    last = path.rpartition(b"/")[2]
    if last and b";" not in last:
        return last
    segments = (segment.partition(b";")[0] for segment in reversed(path.split(b"/")))
    return next(filter(None, segments), b"")


def model_in(target: bytes) -> str:
    """The model that a path of Gemini's shape names; "" in other shapes, whose bodies name it."""
    path = target.partition(b"?")[0]
    _, found, rest = path.rpartition(b"/models/")
    return rest.partition(b":")[0].decode("ascii", "replace") if found else ""
