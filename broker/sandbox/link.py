"""The link to the agent server of one sandbox incarnation: what the broker says to it and hears from it."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import structlog

from broker.errors import Code, CortexError
from broker.host.tasks import TaskOwner
from broker.metrics import LINK_VIOLATIONS
from broker.sandbox.control_channel import ControlChannel, Flood
from broker.sandbox.gate import Gate
from broker.sandbox.grants import Grants
from broker.sandbox.journal_files import JournalFiles
from broker.sandbox.limits import LinkLimits, TokenBucket
from broker.sandbox.questions import Answer, Questions
from broker.sandbox.sockets import SlotSockets
from broker.sandbox.streams import IdleStreams
from sandbox_agent.wire.codec import MAX_PREAMBLE, VERSION, WireError, pack
from sandbox_agent.wire.messages import (
    Attach,
    Bind,
    Bound,
    Build,
    Built,
    Hello,
    Message,
    Preamble,
    Probe,
    Refreshed,
    Status,
    Stop,
    Welcome,
)

__all__ = ["JournalFiles", "Link", "LinkLimits", "SlotSockets", "incarnation_secret"]

log = structlog.get_logger(__name__)
_STOP_MARGIN = 1.0
_BUILD_MARGIN = 10.0
_CODES = {code.slug: code for code in Code}


def incarnation_secret(installation_key: bytes, slot: str, incarnation: int) -> bytes:
    """HMAC-SHA256 of ``slot|incarnation`` under the installation key; 32 bytes."""
    return hmac.digest(installation_key, f"{slot}|{incarnation}".encode(), hashlib.sha256)


class Link:
    """One incarnation of one sandbox. Make it and ``start`` it before the sandbox is started.

    The first ``Hello`` without a secret is accepted once (never when ``welcomed``: the sandbox had its
    welcome from an earlier run of the broker and presents its secret). ``on_hello(link, hello)`` answers
    with the Welcome and must have made durable that this incarnation was welcomed; ``incarnation`` and
    ``secret`` in it are filled in here. It is called again when the agent server redials. ``on_status``
    hears each Status; ``on_refreshed`` hears of each credential file that the agent has changed, and without it
    such a message breaks the protocol; ``on_lost(reason)`` is called once, when the sandbox has to be replaced:
    control gone for ``redial_timeout_s``, or too many violations. The callables and ``journal`` may be replaced
    (a generic sandbox that is claimed).

    Every call raises ``CortexError`` (``SANDBOX_DIED``) once the link is closed or lost.
    """

    def __init__(
        self,
        sockets: SlotSockets,
        incarnation: int,
        *,
        installation_key: bytes,
        on_hello: Callable[[Link, Hello], Awaitable[Welcome]],
        on_status: Callable[[Status], None],
        on_lost: Callable[[str], None],
        on_refreshed: Callable[[Refreshed], None] | None = None,
        journal: JournalFiles | None = None,
        welcomed: bool = False,
        limits: LinkLimits | None = None,
    ) -> None:
        self.slot = sockets.slot.id
        self.incarnation = incarnation
        self.on_hello = on_hello
        self.on_status = on_status
        self.on_lost = on_lost
        self.on_refreshed = on_refreshed
        self.journal = journal
        self.hello: Hello | None = None
        """The last Hello; None before the first."""
        self.status: Status | None = None
        """The last Status."""
        self.violations = 0
        self._secret = incarnation_secret(installation_key, self.slot, incarnation)
        self._limits = limits or LinkLimits()
        self._refreshed = TokenBucket(self._limits.refreshed_burst, self._limits.refreshed_per_s)
        self._accepted = welcomed
        self._tasks = TaskOwner(f"link.{self.slot}.{incarnation}")
        self._gate = Gate(sockets.agent, self._limits, self._tasks, admit=self._admit, violation=self._violation)
        self._streams = IdleStreams(self._limits.max_idle_streams, self._violation)
        self._channel: ControlChannel | None = None
        self._connected = False
        self._stopping = False
        self._dead = ""
        self._up = asyncio.Event()
        self._gone = asyncio.Event()
        self._redial: asyncio.TimerHandle | None = None
        self._questions = Questions()
        self._grants = Grants(self.slot, self._violation)

    @property
    def connected(self) -> bool:
        """A control connection is up and welcomed."""
        return self._connected

    def start(self) -> None:
        """Begins to accept connections."""
        self._gate.start()

    # What the broker asks.

    async def wait_hello(self, timeout: float) -> Hello:
        """Returns when a Hello was answered with its Welcome. Raises ``BRINGUP_TIMEOUT`` or ``SANDBOX_DIED``."""
        try:
            async with asyncio.timeout(timeout):
                await self._up.wait()
        except TimeoutError:
            raise CortexError(
                Code.BRINGUP_TIMEOUT,
                f"the agent server in slot {self.slot} did not call within {timeout:g} s",
                hint="look at the sandbox's own output; sandbox.hello_timeout_s is the deadline",
            ) from None
        self._must_live()
        assert self.hello is not None
        return self.hello

    async def bind(
        self, parts: dict[str, Any], hashes: dict[str, str], generation: int, *, timeout: float = 15.0
    ) -> Bound:
        """Sends the parts that differ; returns when they are applied. Raises ``CortexError``, with the
        sandbox's own code and hint when it refused."""
        bound = await self._ask(Bind(self._questions.number(), generation, parts, hashes), Bound, timeout)
        if not bound.ok:
            raise CortexError(
                _CODES.get(bound.code, Code.SANDBOX_PROTOCOL),
                bound.what or "the sandbox refused the configuration",
                hint=bound.hint or "look at the session's configuration",
                details={"parts": sorted(parts)},
            )
        return bound

    async def take_stream(self, attach: Attach, *, timeout: float = 10.0) -> socket.socket:
        """A stream with ``attach`` already written, non-blocking and now the caller's: a waiting one at
        once, without a suspension, else the next to come. Raises ``CortexError``."""
        self._must_live()
        packed = _packed(attach)
        while (sock := self._streams.take()) is not None:
            if _written(sock, packed):
                return sock
        if self._streams.waiting >= self._limits.max_waiting_clients:
            raise CortexError(
                Code.SESSION_BUSY, "too many clients wait for the sandbox", hint="try again when it is ready"
            )
        try:
            async with asyncio.timeout(timeout):
                while True:
                    sock = await self._streams.wait()
                    if _written(sock, packed):
                        return sock
        except TimeoutError:
            raise CortexError(
                Code.BRINGUP_TIMEOUT,
                f"the agent server offered no stream within {timeout:g} s",
                hint="the sandbox is overloaded or stuck; stop the session to have a new one",
            ) from None

    async def probe(self, *, timeout: float = 5.0) -> Status:
        """Asks for a Status. Raises ``CortexError``."""
        return await self._ask(Probe(self._questions.number()), Status, timeout)

    async def stop(self, grace_s: float) -> None:
        """Asks the agent server to end; returns when its control connection is gone, or after ``grace_s``
        plus one second. Never fails; ``on_lost`` is not called for it."""
        self._stopping = True
        self._cancel_redial()
        if self._channel is None or not self._connected:
            return
        self._channel.send(Stop(grace_s))
        try:
            async with asyncio.timeout(grace_s + _STOP_MARGIN):
                await self._gone.wait()
        except TimeoutError:
            log.warning("agent_server_ignored_stop", slot=self.slot, incarnation=self.incarnation)

    async def build(
        self, ecosystem: str, package: str, *, scripts: bool, registry: str = "", timeout: float = 180.0
    ) -> Built:
        """Has a builder install a package; ``Built.ok`` says how it went. Raises ``CortexError``."""
        message = Build(self._questions.number(), ecosystem, package, scripts, registry, timeout)
        return await self._ask(message, Built, timeout + _BUILD_MARGIN)

    async def close(self, reason: str = "closed") -> None:
        """Fences the link: closes what it holds, fails what waits, accepts no more. Idempotent."""
        self._fence(reason)
        await self._tasks.close()

    async def _ask(self, message: Bind | Probe | Build, kind: type[Answer], timeout: float) -> Answer:
        self._must_live()
        if self._channel is None or not self._connected:
            raise _gone_error(self.slot, "its agent server is not connected")
        return await self._questions.ask(self._channel.send, message, kind, timeout)

    def _must_live(self) -> None:
        if self._dead:
            raise _gone_error(self.slot, self._dead)

    # What comes from the sandbox.

    async def _admit(self, sock: socket.socket, preamble: Preamble) -> None:
        if self._dead or not self._proves(sock, preamble):
            return
        if preamble.kind == "control":
            await self._control(sock, first=not preamble.secret)
        elif preamble.kind == "stream":
            # A new socket object over the same descriptor: the gate closes the one it knows.
            stream = socket.socket(fileno=sock.detach())
            stream.setblocking(False)
            self._streams.put(stream)
        elif preamble.kind == "journal":
            if self.journal is not None:
                await self._grants.give(sock, self.journal, preamble.segment)
        else:
            self._violation("kind")

    def _proves(self, sock: socket.socket, preamble: Preamble) -> bool:
        if preamble.version != VERSION:
            self._violation("version")
            if self.hello is None:
                self._lose(
                    f"its agent server speaks version {preamble.version}, this broker {VERSION}: "
                    "build the sandbox image again"
                )
            return False
        if hmac.compare_digest(preamble.secret, self._secret):
            self._gate.known(sock)
            return True
        if preamble.kind == "control" and not preamble.secret and not self._accepted:
            return True
        self._violation("secret")
        return False

    async def _control(self, sock: socket.socket, *, first: bool) -> None:
        channel = ControlChannel(sock, self._limits)
        try:
            async with aclosing(channel.messages()) as messages:
                hello = await self._hello(messages, first=first)
                if hello is None:
                    return
                self._gate.known(sock)
                if await self._welcome(channel, hello):
                    async for message in messages:
                        self._heard(message)
        except Flood as error:
            self._violation("flood")
            if self._channel is channel:
                self._lose(str(error))
        except WireError as error:
            log.warning("sandbox_message_refused", slot=self.slot, error=str(error))
            self._violation("message")
        finally:
            channel.close()
            self._ended(channel)

    async def _hello(self, messages: AsyncGenerator[Message, None], *, first: bool) -> Hello | None:
        """The Hello that opens a control connection, if it may be answered."""
        try:
            async with asyncio.timeout(self._limits.preamble_timeout_s):
                hello = await anext(messages, None)
        except TimeoutError:
            self._violation("hello_timeout")
            return None
        if hello is None or self._dead or self._stopping:
            return None
        if not isinstance(hello, Hello) or (first and self._accepted):
            self._violation("hello")
            return None
        self._accepted = True
        self.hello = hello
        return hello

    async def _welcome(self, channel: ControlChannel, hello: Hello) -> bool:
        previous, self._channel, self._connected = self._channel, channel, False
        self._gone.clear()
        if previous is not None:
            previous.close()
            self._questions.fail(_gone_error(self.slot, "its agent server called again"))
        self._cancel_redial()
        try:
            async with asyncio.timeout(self._limits.welcome_timeout_s):
                welcome = await self.on_hello(self, hello)
        except (TimeoutError, CortexError) as error:
            # Not for a connection that another has taken the place of meanwhile.
            if self._channel is channel:
                self._lose(f"it could not be welcomed: {error}")
            return False
        except Exception:
            self._lose("it could not be welcomed")
            raise
        if self._dead or self._channel is not channel:
            return False
        try:
            channel.send(replace(welcome, incarnation=self.incarnation, secret=self._secret))
        except WireError as error:
            self._lose(f"its welcome is too big: {error}")
            return False
        self._connected = True
        self._up.set()
        return True

    def _heard(self, message: Message) -> None:
        if isinstance(message, (Bound, Built)) or (isinstance(message, Status) and message.id):
            self._questions.answered(message)
        if isinstance(message, Status):
            self.status = message
            if not self._dead:
                self.on_status(message)
        elif isinstance(message, Refreshed):
            self._told_of(message)
        elif isinstance(message, Hello):
            raise WireError("a second hello")

    def _told_of(self, refreshed: Refreshed) -> None:
        if self.on_refreshed is None or not self._refreshed.take(asyncio.get_running_loop().time()):
            self._violation("refreshed")
        elif not self._dead:
            self.on_refreshed(refreshed)

    def _ended(self, channel: ControlChannel) -> None:
        if self._channel is not channel:
            return
        self._channel, self._connected = None, False
        self._gone.set()
        self._questions.fail(_gone_error(self.slot, "its agent server hung up"))
        if not self._dead and not self._stopping:
            self._redial = asyncio.get_running_loop().call_later(
                self._limits.redial_timeout_s, self._lose, "its agent server hung up and did not call again"
            )

    # The end.

    def _violation(self, kind: str) -> None:
        LINK_VIOLATIONS.labels(kind).inc()
        self.violations += 1
        if self.violations & (self.violations - 1) == 0:
            log.warning("sandbox_violation", slot=self.slot, kind=kind, count=self.violations)
        if self.violations > self._limits.max_violations:
            self._lose(f"it broke the protocol {self.violations} times, last: {kind}")

    def _lose(self, reason: str) -> None:
        if self._dead:
            return
        log.warning("sandbox_lost", slot=self.slot, incarnation=self.incarnation, reason=reason)
        self._fence(reason)
        self.on_lost(reason)

    def _fence(self, reason: str) -> None:
        if self._dead:
            return
        self._dead = reason or "closed"
        self._connected = False
        self._gate.stop()
        self._cancel_redial()
        if self._channel is not None:
            self._channel.close()
        self._questions.fail(_gone_error(self.slot, self._dead))
        self._streams.close(_gone_error(self.slot, self._dead))
        self._up.set()
        self._gone.set()

    def _cancel_redial(self) -> None:
        if self._redial is not None:
            self._redial.cancel()
            self._redial = None


def _gone_error(slot: str, reason: str) -> CortexError:
    return CortexError(
        Code.SANDBOX_DIED,
        f"the sandbox in slot {slot} cannot be reached",
        hint="it is replaced when the session is next used; try again",
        cause=reason,
    )


def _packed(attach: Attach) -> bytes:
    try:
        return pack(attach.encode(), limit=MAX_PREAMBLE)
    except WireError as error:
        raise CortexError(Code.BAD_REQUEST, "the client's name is too long", hint="use a shorter one") from error


def _written(sock: socket.socket, packed: bytes) -> bool:
    """Whether all of ``packed`` went out; closes the socket otherwise."""
    try:
        if sock.send(packed) == len(packed):
            return True
    except OSError as error:
        log.debug("stream_lost", error=str(error))
    sock.close()
    return False
