"""Opens connections to the outside: resolve, judge every address, connect to one that passed, TLS."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import TypeVar

from broker.errors import Code, CortexError
from broker.gateway.addresses import permitted
from broker.gateway.answers import address_refused
from broker.gateway.resolve import Answer, Resolver
from broker.gateway.routes import Origin
from broker.gateway.tls import ClientContext

P = TypeVar("P", bound=asyncio.Protocol)
MAX_ADDRESSES = 8
MAX_CONTEXTS = 64


class Dialer:
    """``timeout_s`` gives the deadline of connecting, TLS included (``gateway.connect_timeout_s``).

    ``guests`` looks up what users and sandboxes name (default: ``resolver``, which is for operators'
    providers), so that slow names of theirs hold up nobody's model calls.
    """

    def __init__(self, resolver: Resolver, timeout_s: Callable[[], float], guests: Resolver | None = None) -> None:
        self._resolver = resolver
        self._guests = guests or resolver
        self._timeout_s = timeout_s
        self._contexts: dict[str, ClientContext] = {}

    @property
    def timeout_s(self) -> float:
        """The deadline of connecting."""
        return self._timeout_s()

    async def dial(self, origin: Origin, factory: Callable[[], P]) -> P:
        """A connected protocol. Raises ``CortexError``: unreachable, or all addresses refused."""
        operators = origin.pooled and origin.private and not origin.whose
        resolver = self._resolver if operators else self._guests
        found = await resolver.answer(origin.host, origin.whose)
        context = await self._context(origin.ca) if origin.scheme == "https" else None
        start, timeout_s = asyncio.get_running_loop().time(), self._timeout_s()
        try:
            share = timeout_s / 2 if found.renewing else timeout_s
            return await self._try(origin, found.addresses, context, factory, start + share)
        except CortexError:
            newer = await _newer(resolver, origin.host, found)
            if not newer:
                raise
        return await self._try(origin, newer, context, factory, start + timeout_s)

    async def _try(
        self,
        origin: Origin,
        addresses: list[str],
        context: ClientContext | None,
        factory: Callable[[], P],
        deadline: float,
    ) -> P:
        """One address after the other, each with its share of the time left, and judged at every dial, however old
        the answer is."""
        addresses = permitted(addresses, private=origin.private)[:MAX_ADDRESSES]
        if not addresses:
            raise address_refused(origin.host)
        last: BaseException = TimeoutError()
        for count, address in enumerate(addresses):
            share = (deadline - asyncio.get_running_loop().time()) / (len(addresses) - count)
            if share <= 0:
                break
            try:
                return await asyncio.wait_for(_connect(origin, address, context, factory), share)
            except (OSError, TimeoutError) as error:
                last = error
        raise _unreachable(origin, last) from last

    async def _context(self, ca: str) -> ClientContext:
        """Reading a bundle takes tens of milliseconds, so in a thread, and once."""
        context = self._contexts.get(ca)
        if context is None:
            try:
                context = await asyncio.get_running_loop().run_in_executor(None, ClientContext.trusting, ca)
            except (ssl.SSLError, ValueError) as error:
                raise CortexError(
                    Code.UPSTREAM_UNREACHABLE,
                    "The CA bundle of this provider cannot be read",
                    hint="check the provider's ca_file: PEM certificates",
                ) from error
            if len(self._contexts) >= MAX_CONTEXTS:
                self._contexts.clear()
            self._contexts[ca] = context
        return context

    async def warm(self) -> None:
        """Reads the system's bundle ahead of the first call."""
        await self._context("")


async def _newer(resolver: Resolver, host: str, found: Answer) -> list[str]:
    """Addresses that an answer past its time did not have: the server may have moved since."""
    if not found.renewing:
        return []
    try:
        return [address for address in await resolver.renewed(host) if address not in found.addresses]
    except CortexError:
        return []


async def _connect(origin: Origin, address: str, context: ssl.SSLContext | None, factory: Callable[[], P]) -> P:
    loop = asyncio.get_running_loop()
    _, protocol = await loop.create_connection(
        factory, address, origin.port, ssl=context, server_hostname=origin.host if context else None
    )
    return protocol


def _unreachable(origin: Origin, error: BaseException) -> CortexError:
    if isinstance(error, ssl.SSLCertVerificationError):
        cause, hint = f"its certificate is not trusted: {error.verify_message}", "an operator can set ca_file"
    elif isinstance(error, ssl.SSLError):
        cause, hint = "TLS failed", "check that the port speaks TLS"
    elif isinstance(error, TimeoutError):
        cause, hint = "connecting took too long", "retry; if it stays, check the host's network"
    elif isinstance(error, ConnectionRefusedError):
        cause, hint = "connection refused", "check that the server runs"
    else:
        cause, hint = "connecting failed", "check the host's network"
    return CortexError(Code.UPSTREAM_UNREACHABLE, f"{origin.host} cannot be reached", cause=cause, hint=hint)
