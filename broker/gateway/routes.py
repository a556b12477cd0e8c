"""From a request of a sandbox to the request a provider gets, and back: paths, headers, credentials. Pure.

A provider is reached at ``/NAME/rest``: ``rest`` goes behind its base URL, byte for byte. Headers
pass as they came, except those of this hop, those that carry credentials or cookies (whatever the
sandbox believes its key to be is worth nothing), and Host. Where a user's CLI has credentials of
its own (scheme ``passthrough``) those pass, for that slot and provider alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import unquote_to_bytes, urlsplit

from broker.errors import Code, CortexError
from broker.gateway.addresses import parse_authority
from broker.gateway.answers import unknown_provider
from broker.gateway.heads import RequestHead, ResponseHead, bad
from broker.gateway.messages import Provider

_HOP = frozenset(
    (
        b"connection", b"keep-alive", b"proxy-connection", b"proxy-authenticate", b"proxy-authorization", b"te",
        b"trailer", b"transfer-encoding", b"upgrade", b"http2-settings", b"content-length", b"host", b"expect",
    )
)  # fmt: skip
_COOKIES = frozenset((b"cookie", b"cookie2"))
_CREDENTIALS = frozenset((b"authorization", b"x-api-key", b"api-key", b"x-goog-api-key", b"x-auth-token"))
_KEY_PARAMETERS = frozenset((b"key", b"api_key", b"access_token", b"oauth_token", b"bearer_token"))
_REQUEST_DROPS = _HOP | _CREDENTIALS | _COOKIES
_LISTS = frozenset((b"anthropic-beta", b"openai-beta"))
"""Headers that hold a list: what is put in joins what the sandbox sends."""
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}")
_RESPONSE_DROPS = (_HOP - {b"host", b"expect"}) | {
    b"set-cookie", b"set-cookie2", b"alt-svc", b"anthropic-organization-id", b"openai-organization", b"openai-project",
}  # fmt: skip

_BEARER = b"authorization: Bearer %s\r\n"
_CREDENTIAL_HEADER = {
    "anthropic": b"x-api-key: %s\r\n",
    "openai": _BEARER,
    "gemini": b"x-goog-api-key: %s\r\n",
    "ollama": _BEARER,
}


@dataclass(frozen=True, slots=True)
class Origin:
    """Where connections go. ``ca``: PEM bundle or ""; ``private``: private addresses are fine; ``pooled``:
    connections are kept and shared, which is for providers, not for hosts that a sandbox names."""

    scheme: str
    host: str
    port: int
    ca: str
    private: bool
    pooled: bool = True

    @property
    def authority(self) -> str:
        """The Host header: no port where it is the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.scheme == "https" else 80) else f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Route:
    """A provider made ready: ``fixed`` is the lines that are put in (Host, the credential's), each with CRLF;
    ``joins``: members of list headers by name; ``own_keys``: the sandbox's own credentials pass."""

    name: str
    origin: Origin
    base_path: bytes
    fixed: bytes
    drops: frozenset[bytes] = _REQUEST_DROPS
    joins: Mapping[bytes, bytes] = field(default_factory=dict)
    own_keys: bool = False

    def __repr__(self) -> str:
        return f"Route({self.name!r}, {self.origin.authority!r})"


def compile_routes(providers: Mapping[str, Provider]) -> dict[bytes, Route]:
    """Routes by name. Raises ``CortexError`` (``BAD_CONFIG``) that names the provider, never the credential."""
    return {name.encode(): _compile(name, provider) for name, provider in providers.items()}


def _compile(name: str, provider: Provider) -> Route:
    def wrong(what: str, hint: str) -> CortexError:
        return CortexError(Code.BAD_CONFIG, f"provider {name}: {what}", hint=hint)

    url_hint = "give base_url as https://host[:port][/path]"
    try:
        url = urlsplit(provider.base_url)
        authority = parse_authority(url.netloc, 443 if url.scheme == "https" else 80)
    except ValueError as error:
        raise wrong("base_url is malformed", url_hint) from error
    if url.scheme not in ("http", "https") or authority is None or url.query or url.fragment:
        raise wrong("base_url is malformed", url_hint)
    if not (provider.base_url.isascii() and provider.base_url.isprintable() and " " not in url.path):
        raise wrong("base_url has odd characters", url_hint)
    if not _printable(provider.credential):
        raise wrong("the credential has odd characters", "store the key alone, without line ends")
    template = _CREDENTIAL_HEADER.get(provider.kind)
    if template is None:
        raise wrong(f"kind {provider.kind!r} is unknown", f"one of {', '.join(_CREDENTIAL_HEADER)}")
    if provider.scheme not in ("key", "bearer", "passthrough"):
        raise wrong(f"scheme {provider.scheme!r} is unknown", "key, bearer or passthrough")
    own_keys = provider.scheme == "passthrough"
    if own_keys and provider.credential:
        raise wrong("the sandbox's own credential passes, or one is put in; not both", "leave the credential out")
    extra = {name.lower().encode("ascii", "replace"): value.encode() for name, value in provider.headers.items()}
    taken = _HOP | _COOKIES | _CREDENTIALS
    for header, value in provider.headers.items():
        if not _HEADER_NAME.fullmatch(header) or header.lower().encode() in taken or not _printable(value):
            raise wrong(f"header {header[:64]!r} cannot be put in", "a plain header with a value of one line")
    origin = Origin(url.scheme, authority[0], authority[1], provider.ca, provider.private)
    fixed = b"host: %s\r\n" % origin.authority.encode()
    if provider.credential:
        fixed += (_BEARER if provider.scheme == "bearer" else template) % provider.credential.encode()
    joins = {header: value for header, value in extra.items() if header in _LISTS}
    sets = extra.keys() - joins.keys()
    fixed += b"".join(b"%s: %s\r\n" % (header, extra[header]) for header in sorted(sets))
    drops = (_HOP | _COOKIES if own_keys else _REQUEST_DROPS) | sets
    return Route(name, origin, url.path.rstrip("/").encode(), fixed, drops, joins, own_keys)


def _printable(text: str) -> bool:
    return text.isascii() and text.isprintable()


def find_route(routes: Mapping[bytes, Route], target: bytes) -> tuple[Route, bytes]:
    """The route of an origin-form ``target`` and the target that its provider gets.
    Raises ``CortexError``: 400, or 404 for a name that is not there."""
    if not target.startswith(b"/"):
        raise bad("the request target is not a path")
    path, question, query = target.partition(b"?")
    name, _, rest = path[1:].partition(b"/")
    route = routes.get(name)
    if route is None:
        raise unknown_provider(name.decode("ascii", "replace"), [known.decode() for known in routes])
    if b"." in rest or b"%" in rest or b"\\" in rest:
        _refuse_dot_segments(rest)
    if question and query and not route.own_keys:
        query = strip_keys(query)
    return route, route.base_path + b"/" + rest + (b"?" + query if query else b"")


def _refuse_dot_segments(path: bytes) -> None:
    """``..`` could climb out of the base URL's path, however a server decodes it."""
    for _ in range(2):
        path = unquote_to_bytes(path)
        # Some servers cut parameters off first: "..;x" is ".." to them.
        segments = {segment.partition(b";")[0] for segment in path.replace(b"\\", b"/").split(b"/")}
        if not segments.isdisjoint((b".", b"..")):
            raise bad("the path has dot segments")


def strip_keys(query: bytes) -> bytes:
    """``query`` without the parameters that carry credentials; untouched when there are none."""
    parts = query.split(b"&")
    kept = [part for part in parts if unquote_to_bytes(part.partition(b"=")[0]).lower() not in _KEY_PARAMETERS]
    return query if len(kept) == len(parts) else b"&".join(kept)


def proxy_route(target: bytes, *, private: bool) -> tuple[Route, bytes] | None:
    """The route of a plain ``http://host[:port]/path`` proxy request; None when malformed."""
    scheme, found, rest = target.partition(b"://")
    if not found or scheme.lower() != b"http":
        return None
    cut = min((at for at in (rest.find(b"/"), rest.find(b"?")) if at >= 0), default=len(rest))
    authority = parse_authority(rest[:cut].decode("ascii", "replace"), 80)
    if authority is None:
        return None
    origin = Origin("http", authority[0], authority[1], "", private, pooled=False)
    path = rest[cut:] if rest[cut : cut + 1] == b"/" else b"/" + rest[cut:]
    return Route(origin.authority, origin, b"", b"host: %s\r\n" % origin.authority.encode(), _HOP), path


def request_head(route: Route, head: RequestHead, target: bytes) -> bytes:
    """The head that goes upstream."""
    drops, joins, named = route.drops, route.joins, head.hop_by_hop
    parts = [b"%s %s HTTP/1.1\r\n" % (head.method, target), route.fixed]
    for name, value in head.headers:
        low = name.lower()
        if low not in drops and low not in named and low not in joins:
            parts.append(b"%s: %s\r\n" % (name, value))
    parts += [b"%s: %s\r\n" % (name, _joined(head, name, ours)) for name, ours in joins.items()]
    if head.chunked:
        parts.append(b"transfer-encoding: chunked\r\n")
    elif head.length is not None:
        parts.append(b"content-length: %d\r\n" % head.length)
    parts.append(b"\r\n")
    return b"".join(parts)


def _joined(head: RequestHead, name: bytes, ours: bytes) -> bytes:
    """The members of a list header that the sandbox sent, then those of ``ours`` that it did not."""
    given = b",".join(value for key, value in head.headers if key.lower() == name)
    return b",".join(dict.fromkeys(part.strip() for part in (given + b"," + ours).split(b",") if part.strip()))


def response_head(head: ResponseHead, *, chunked: bool, close: bool) -> bytes:
    """The head that goes to the sandbox; ``chunked``: its body will be."""
    named = head.hop_by_hop
    parts = [b"HTTP/1.1 %d %s\r\n" % (head.status, head.reason)]
    for name, value in head.headers:
        low = name.lower()
        if low not in _RESPONSE_DROPS and low not in named:
            parts.append(b"%s: %s\r\n" % (name, value))
    if chunked:
        parts.append(b"transfer-encoding: chunked\r\n")
    elif head.length is not None:
        parts.append(b"content-length: %d\r\n" % head.length)
    if close:
        parts.append(b"connection: close\r\n")
    parts.append(b"\r\n")
    return b"".join(parts)
