"""The gateway process's table of slots: who they belong to, where they listen, what is connected."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable, Mapping

import structlog

from broker.errors import Code, CortexError
from broker.gateway import answers
from broker.gateway.caller import Caller
from broker.gateway.context import Context
from broker.gateway.egress import WayOut
from broker.gateway.handover import Doors, asked
from broker.gateway.heads import RequestHead
from broker.gateway.messages import SlotEntry
from broker.gateway.routes import Route, compile_routes
from broker.gateway.server import Connection
from broker.gateway.ways import FaceKind, Held, Way, egress_way, gateway_way
from broker.host.listen import refuse_descriptors

ACCEPT_AT_ONCE = 32
ACCEPT_PAUSE_S = 0.5
_EXHAUSTED = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))
log = structlog.get_logger(__name__)


class Listener:
    """Accepts on a listening Unix socket that was passed in. Closing it leaves the path and the broker's
    own descriptor of it alone. Raises ``CortexError`` when ``sock`` is nothing of the kind."""

    def __init__(self, sock: socket.socket, accepted: Callable[[socket.socket], None]) -> None:
        if sock.family != socket.AF_UNIX or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            sock.close()
            raise CortexError(Code.BAD_CONFIG, "not a listening Unix socket", hint="pass the slot's listeners")
        sock.setblocking(False)
        refuse_descriptors(sock)
        self._sock = sock
        self._accepted = accepted
        self._loop = asyncio.get_running_loop()
        self._pause: asyncio.TimerHandle | None = None
        self._loop.add_reader(sock.fileno(), self._accept)

    def _accept(self) -> None:
        for _ in range(ACCEPT_AT_ONCE):
            try:
                connection, _ = self._sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                log.error("accept_paused", error=str(error))
                self._loop.remove_reader(self._sock.fileno())
                if error.errno in _EXHAUSTED:
                    self._pause = self._loop.call_later(ACCEPT_PAUSE_S, self._go_on)
                return
            connection.setblocking(False)
            self._accepted(connection)

    def _go_on(self) -> None:
        self._pause = None
        self._loop.add_reader(self._sock.fileno(), self._accept)

    def close(self) -> None:
        if self._sock.fileno() < 0:
            return
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._sock.fileno())
        self._sock.close()


class SlotState:
    """One slot. ``entry`` None: taken back; its last connections get 503."""

    def __init__(self, entry: SlotEntry, context: Context) -> None:
        self.slot = entry.slot
        self.entry: SlotEntry | None = None
        self.routes: dict[bytes, Route] = {}
        self.caller = Caller(entry.slot, "")
        self.connections: set[Held] = set()
        self._context = context
        self._listeners: list[Listener] = []
        self.out = WayOut(entry.slot, context)
        self.doors = self._new_doors()
        self.arriving: set[SlotFace] = set()
        """Accepted, and not yet among ``connections``."""
        self.update(entry)

    def update(self, entry: SlotEntry) -> None:
        """Serves as ``entry`` says from the next request on. Raises ``CortexError`` and changes nothing."""
        routes = compile_routes(entry.providers)
        old = self.entry
        self.entry, self.routes = entry, routes
        self.caller = Caller.of(entry.slot, entry.identity or {})
        # An unclaimed slot may be claimed, or a claim's settings change, with connections open; all else is a cut.
        taken = old is not None and old.identity is not None and _whose(old.identity) != _whose(entry.identity)
        if old is not None and (taken or old.incarnation != entry.incarnation):
            self._fence()
            self.doors.shut()
            self.doors = self._new_doors()
        self.out.set(entry.egress, entry.identity)

    def _new_doors(self) -> Doors:
        return Doors(self.slot, lambda sock: self._accepted(sock, "gateway"))

    def listen(self, gateway: socket.socket, egress: socket.socket) -> None:
        """Accepts on these from now on; connections of earlier listeners stay."""
        fresh: list[Listener] = []
        try:
            fresh.append(Listener(gateway, lambda sock: self._accepted(sock, "gateway")))
            fresh.append(Listener(egress, lambda sock: self._accepted(sock, "egress")))
        except CortexError:
            self._close(fresh)
            egress.close()
            raise
        old, self._listeners = self._listeners, fresh
        self._close(old)

    @property
    def listens(self) -> bool:
        return bool(self._listeners)

    def stop_listening(self) -> None:
        self._close(self._listeners)
        self._listeners = []

    def drop(self) -> None:
        """Cut off: nothing is accepted, what runs is broken off, idle connections get 503."""
        self.stop_listening()
        self.entry, self.routes = None, {}
        self._fence()
        self.doors.shut()
        self.out.flush()

    def _fence(self) -> None:
        for connection in list(self.connections):
            connection.fence()

    @staticmethod
    def _close(listeners: list[Listener]) -> None:
        for listener in listeners:
            listener.close()

    def _accepted(self, sock: socket.socket, kind: FaceKind) -> None:
        limit = self._context.settings.max_connections_per_sandbox
        if len(self.connections) + len(self.arriving) >= limit:
            self._context.stats.refused += 1
            _turn_away(sock, answers.answer(answers.too_many(limit), close=True))
            return
        incarnation = self.entry.incarnation if self.entry is not None else -1
        face = SlotFace(self, kind, incarnation, self._context)
        self.arriving.add(face)
        self._context.tasks.start(self._serve(sock, face), "accept", on_error=_lost_early)

    async def _serve(self, sock: socket.socket, face: SlotFace) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.connect_accepted_socket(lambda: Connection(face, self._context), sock)
        finally:
            self.arriving.discard(face)


class SlotFace:
    """The gateway or egress socket of a slot, as one connection sees it."""

    def __init__(self, state: SlotState, kind: FaceKind, incarnation: int, context: Context) -> None:
        self.slot = state.slot
        self._state = state
        self._context = context
        self._kind = kind
        self._incarnation = incarnation

    def way(self, head: RequestHead) -> Way:
        entry = self._state.entry
        if entry is None or entry.incarnation != self._incarnation:
            raise answers.unclaimed()
        if self._kind == "gateway" and asked(head) and not self._context.draining:
            return Way(doors=self._state.doors)
        if entry.identity is None:
            raise answers.unclaimed()
        if self._kind == "gateway":
            return gateway_way(head, self._state.routes, self._state.caller, self._context.speaks_websocket)
        return egress_way(head, self._state.out)

    def opened(self, connection: Held) -> None:
        self._state.arriving.discard(self)
        self._state.connections.add(connection)
        self._context.stats.connections += 1

    def closed(self, connection: Held) -> None:
        self._state.connections.discard(connection)
        self._context.stats.connections -= 1
        if not self._context.stats.connections:
            self._context.emptied.set()


def _lost_early(error: BaseException) -> None:
    log.debug("connection_lost_early", error=str(error))


def _turn_away(sock: socket.socket, answer: bytes) -> None:
    try:
        sock.send(answer)
    except OSError as error:
        log.debug("turned_away_unheard", error=str(error))
    finally:
        sock.close()


class Table:
    """All slots. Calls are synchronous: when one returns, it holds."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._slots: dict[str, SlotState] = {}
        self._fading: set[SlotState] = set()

    def __len__(self) -> int:
        return len(self._slots)

    def put(self, entry: SlotEntry, listeners: tuple[socket.socket, socket.socket] | None) -> None:
        """Adds or changes a slot. Raises ``CortexError``: the old state, if any, then stands."""
        state = self._slots.get(entry.slot)
        if state is not None and state.entry is not None and entry.incarnation < state.entry.incarnation:
            _close_all(listeners)
            raise CortexError(Code.BAD_CONFIG, f"slot {entry.slot}: stale incarnation", hint="use the newest one")
        if state is None and listeners is None:
            raise CortexError(Code.BAD_CONFIG, f"slot {entry.slot}: no listeners yet", hint="pass them the first time")
        try:
            if state is None:
                state = SlotState(entry, self._context)
            else:
                state.update(entry)
        except CortexError:
            _close_all(listeners)
            raise
        if listeners is not None:
            state.listen(*listeners)
        self._slots[entry.slot] = state

    def drop(self, slot: str) -> None:
        state = self._slots.pop(slot, None)
        if state is not None:
            state.drop()
            if state.connections:
                self._fading.add(state)

    def keep_only(self, slots: set[str]) -> None:
        """Drops all others."""
        for slot in self._slots.keys() - slots:
            self.drop(slot)

    def sweep(self, now: float) -> None:
        """Every second or so: time limits of all connections."""
        for state in [*self._slots.values(), *self._fading]:
            state.out.tell(now)
            for connection in list(state.connections):
                connection.check(now)
        self._fading = {state for state in self._fading if state.connections}

    def drain(self) -> None:
        """Accepts nothing more; connections end when their work does."""
        for state in self._slots.values():
            state.stop_listening()
        for connection in self._connections():
            connection.drain()

    @property
    def idle(self) -> bool:
        """No connection is left."""
        return not self._connections()

    def abort(self) -> None:
        for connection in self._connections():
            connection.abort()

    def _connections(self) -> list[Held]:
        return [each for state in [*self._slots.values(), *self._fading] for each in state.connections]


def _whose(identity: Mapping[str, str] | None) -> tuple[str | None, ...] | None:
    """The session; what else is said of it, such as a team, may change while its calls run."""
    return None if identity is None else tuple(identity.get(key) for key in ("user", "workspace", "session"))


def _close_all(listeners: tuple[socket.socket, socket.socket] | None) -> None:
    for sock in listeners or ():
        sock.close()
