"""From a request of a sandbox to the request a provider gets, and back: paths, headers, credentials. Pure.

A provider is reached at ``/NAME/rest``: ``rest`` goes behind its base URL, byte for byte. Headers
pass as they came, except those of this hop, those that carry credentials or cookies (whatever the
sandbox believes its key to be is worth nothing) or say which account pays, and Host. Where a user's
CLI has credentials of its own (scheme ``passthrough``) those pass, for that slot and provider alone.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import unquote_to_bytes, urlsplit

from broker.errors import Code, CortexError
from broker.gateway.addresses import parse_authority
from broker.gateway.answers import unknown_provider
from broker.gateway.heads import Headers, RequestHead, ResponseHead, bad
from broker.gateway.messages import Provider
from broker.gateway.policy import Kind

_HOP = frozenset(
    (
        b"connection", b"keep-alive", b"proxy-connection", b"proxy-authenticate", b"proxy-authorization", b"te",
        b"trailer", b"transfer-encoding", b"upgrade", b"http2-settings", b"content-length", b"host", b"expect",
    )
)  # fmt: skip
_COOKIES = frozenset((b"cookie", b"cookie2"))
_CREDENTIALS = frozenset((b"authorization", b"x-api-key", b"api-key", b"x-goog-api-key", b"x-auth-token"))
ACCOUNTS = frozenset(
    (
        b"openai-organization", b"openai-project", b"chatgpt-account-id", b"anthropic-workspace-id",
        b"x-goog-user-project", b"x-hf-bill-to", b"x-dashscope-workspace",
    )
)  # fmt: skip
"""Headers that choose who is billed, among the accounts that a credential is good for."""
_KEY_PARAMETERS = frozenset((b"key", b"api_key", b"access_token", b"oauth_token", b"bearer_token", b"userproject"))
_REQUEST_DROPS = _HOP | _CREDENTIALS | ACCOUNTS | _COOKIES
_LISTS = frozenset((b"anthropic-beta", b"openai-beta"))
"""Headers that hold a list: what is put in joins what the sandbox sends."""
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}")
_RESPONSE_DROPS = (_HOP - {b"host", b"expect"}) | {
    b"set-cookie", b"set-cookie2", b"alt-svc", b"anthropic-organization-id", b"openai-organization", b"openai-project",
}  # fmt: skip

_ENCODING = b"accept-encoding"
_IDENTITY = b"accept-encoding: identity\r\n"
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
    connections are kept and shared, which is for providers, not for hosts that a sandbox names; ``whose``: the slot
    of that sandbox."""

    scheme: str
    host: str
    port: int
    ca: str
    private: bool
    pooled: bool = True
    whose: str = ""

    @property
    def authority(self) -> str:
        """The Host header: no port where it is the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.scheme == "https" else 80) else f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Spot:
    """A server: what is asked of it goes behind ``base_path``."""

    origin: Origin
    base_path: bytes
    host_line: bytes


@dataclass(frozen=True, slots=True)
class Route:
    """A provider as one slot may use it. ``credential`` and ``fixed``: lines that are put in, each with CRLF;
    ``own``: name of the slot's own credential, for limits and cache ("": the operator's are used); ``joins``:
    members of list headers by name; ``own_keys``: the sandbox's own credentials pass."""

    name: str
    kind: Kind
    spot: Spot
    credential: bytes = field(default=b"", repr=False)
    fixed: bytes = field(default=b"", repr=False)
    own: str = ""
    policy: str = ""
    drops: frozenset[bytes] = _REQUEST_DROPS
    joins: Mapping[bytes, bytes] = field(default_factory=dict)
    own_keys: bool = False

    def payer(self, user: str) -> str:
        """The slot's own credential as limits name it, "": it has none."""
        return f"user:{user}" if self.own_keys else self.own


def compile_routes(providers: Mapping[str, Provider]) -> dict[bytes, Route]:
    """Routes by name. Raises ``CortexError`` (``BAD_CONFIG``) that names the provider, never the credential."""
    return {name.encode(): _compile(name, provider) for name, provider in providers.items()}


def _wrong(name: str, what: str, hint: str) -> CortexError:
    return CortexError(Code.BAD_CONFIG, f"provider {name}: {what}", hint=hint)


def compile_spot(name: str, base_url: str, ca: str, *, private: bool = True, pooled: bool = True) -> Spot:
    """The server at ``base_url``. Raises ``CortexError`` (``BAD_CONFIG``)."""
    url_hint = "give base_url as https://host[:port][/path]"
    try:
        url = urlsplit(base_url)
        authority = parse_authority(url.netloc, 443 if url.scheme == "https" else 80)
    except ValueError as error:
        raise _wrong(name, "base_url is malformed", url_hint) from error
    if url.scheme not in ("http", "https") or authority is None or url.query or url.fragment:
        raise _wrong(name, "base_url is malformed", url_hint)
    if not (base_url.isascii() and base_url.isprintable() and " " not in url.path):
        raise _wrong(name, "base_url has odd characters", url_hint)
    origin = Origin(url.scheme, authority[0], authority[1], ca, private, pooled)
    return Spot(origin, url.path.rstrip("/").encode(), b"host: %s\r\n" % origin.authority.encode())


def credential_line(name: str, kind: Kind, credential: str, *, bearer: bool = False) -> bytes:
    """The header that authenticates. Raises ``CortexError`` (``BAD_CONFIG``)."""
    if not _printable(credential):
        raise _wrong(name, "the credential has odd characters", "store the key alone, without line ends")
    template = _CREDENTIAL_HEADER.get(kind)
    if template is None:
        raise _wrong(name, f"kind {kind!r} is unknown", f"one of {', '.join(_CREDENTIAL_HEADER)}")
    return (_BEARER if bearer else template) % credential.encode() if credential else b""


def _compile(name: str, provider: Provider) -> Route:
    line = credential_line(name, provider.kind, provider.credential, bearer=provider.scheme == "bearer")
    if provider.scheme not in ("key", "bearer", "passthrough"):
        raise _wrong(name, f"scheme {provider.scheme!r} is unknown", "key, bearer or passthrough")
    own_keys = provider.scheme == "passthrough"
    if own_keys and provider.credential:
        raise _wrong(
            name, "the sandbox's own credential passes, or one is put in; not both", "leave the credential out"
        )
    extra = {header.lower().encode("ascii", "replace"): value.encode() for header, value in provider.headers.items()}
    taken = _HOP | _COOKIES | _CREDENTIALS
    for header, value in provider.headers.items():
        if not _HEADER_NAME.fullmatch(header) or header.lower().encode() in taken or not _printable(value):
            raise _wrong(name, f"header {header[:64]!r} cannot be put in", "a plain header with a value of one line")
    joins = {header: value for header, value in extra.items() if header in _LISTS}
    sets = extra.keys() - joins.keys()
    return Route(
        name=name,
        kind=provider.kind,
        spot=compile_spot(name, provider.base_url, provider.ca, private=provider.private),
        credential=line,
        fixed=b"".join(b"%s: %s\r\n" % (header, extra[header]) for header in sorted(sets)),
        own="passthrough" if own_keys else _fingerprint(line),
        policy=provider.policy,
        drops=(_HOP | _COOKIES if own_keys else _REQUEST_DROPS) | sets,
        joins=joins,
        own_keys=own_keys,
    )


def _fingerprint(line: bytes) -> str:
    return hashlib.blake2b(line, digest_size=12).hexdigest() if line else ""


def _printable(text: str) -> bool:
    return text.isascii() and text.isprintable()


def find_route(routes: Mapping[bytes, Route], target: bytes) -> tuple[Route, bytes]:
    """The route of an origin-form ``target`` and what goes behind the base path of its server.
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
    return route, b"/" + rest + (b"?" + query if query else b"")


def _refuse_dot_segments(path: bytes) -> None:
    """``..`` could climb out of the base URL's path, however a server decodes it."""
    for _ in range(2):
        path = unquote_to_bytes(path)
        # Some servers cut parameters off first: "..;x" is ".." to them.
        segments = {segment.partition(b";")[0] for segment in path.replace(b"\\", b"/").split(b"/")}
        if not segments.isdisjoint((b".", b"..")):
            raise bad("the path has dot segments")


def strip_keys(query: bytes) -> bytes:
    """``query`` without the parameters that carry credentials or say who pays; untouched when there are none."""
    parts = query.split(b"&")
    kept = [part for part in parts if _parameter(part) not in _KEY_PARAMETERS]
    return query if len(kept) == len(parts) else b"&".join(kept)


def _parameter(part: bytes) -> bytes:
    """Its name. Google's may have a "$" in front."""
    return unquote_to_bytes(part.partition(b"=")[0]).lower().removeprefix(b"$")


def without_keys(target: bytes) -> bytes:
    """``target`` without credentials in its query."""
    path, question, query = target.partition(b"?")
    query = strip_keys(query)
    return path + question + query if query else path


def proxy_route(target: bytes, *, private: bool, whose: str = "") -> tuple[Route, bytes] | None:
    """The route of a plain ``http://host[:port]/path`` proxy request; None when malformed."""
    scheme, found, rest = target.partition(b"://")
    if not found or scheme.lower() != b"http":
        return None
    cut = min((at for at in (rest.find(b"/"), rest.find(b"?")) if at >= 0), default=len(rest))
    authority = parse_authority(rest[:cut].decode("ascii", "replace"), 80)
    if authority is None:
        return None
    origin = Origin("http", authority[0], authority[1], "", private, pooled=False, whose=whose)
    path = rest[cut:] if rest[cut : cut + 1] == b"/" else b"/" + rest[cut:]
    spot = Spot(origin, b"", b"host: %s\r\n" % origin.authority.encode())
    return Route(origin.authority, "openai", spot, drops=_HOP, own_keys=True), path


def passing(route: Route, head: RequestHead, *, plain: bool = False) -> Headers:
    """The headers of ``head`` that have a say in what a provider is asked; ``plain`` as for ``passed``."""
    drops, named = route.drops, head.hop_by_hop
    return [
        (name, value)
        for name, value in head.headers
        if (low := name.lower()) not in drops and low not in named and not (plain and low == _ENCODING)
    ]


def passed(route: Route, head: RequestHead, *, plain: bool = False) -> bytes:
    """The lines of ``head`` that go upstream, with what is put in and the body's framing, whichever server it is.
    ``plain``: the answer is read here, so it must not be compressed."""
    joins = route.joins
    parts = [route.fixed]
    parts += [b"%s: %s\r\n" % line for line in passing(route, head, plain=plain) if line[0].lower() not in joins]
    if plain:
        parts.append(_IDENTITY)
    parts += [b"%s: %s\r\n" % (name, _joined(head, name, ours)) for name, ours in joins.items()]
    if head.chunked:
        parts.append(b"transfer-encoding: chunked\r\n")
    elif head.length is not None:
        parts.append(b"content-length: %d\r\n" % head.length)
    return b"".join(parts)


def without_framing(lines: bytes) -> bytes:
    """``lines`` of ``passed`` for another body."""
    framing = (b"content-length:", b"transfer-encoding:")
    return b"".join(line for line in lines.splitlines(keepends=True) if not line.startswith(framing))


def request_head(spot: Spot, method: bytes, target: bytes, credential: bytes, lines: bytes) -> bytes:
    """The head that goes upstream; ``lines`` as ``passed`` gives them."""
    return b"%s %s%s HTTP/1.1\r\n%s%s%s\r\n" % (method, spot.base_path, target, spot.host_line, credential, lines)


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
