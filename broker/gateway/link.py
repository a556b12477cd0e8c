"""The broker's side of the link to the gateway process: which slot is whose, and with what.

The broker listens, the gateway dials and redials. Every wish is kept here and told again, held
listeners included, to a gateway that comes anew; a call returns when the gateway has
acknowledged, so the broker knows that a slot is served, or no longer is.
"""

from __future__ import annotations

import asyncio
import os
import pwd
import socket
import struct
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import structlog

from broker.config import GatewayConfig
from broker.errors import Code, CortexError
from broker.gateway.messages import (
    VERSION,
    Egress,
    MessageError,
    Provider,
    Scheme,
    Settings,
    SlotEntry,
    entry_to_wire,
    pack,
)
from broker.gateway.packets import PacketSocket
from broker.gateway.policy import CacheStore, Policy
from broker.gateway.shown import show_providers
from broker.gateway.stats import GAUGES
from broker.gateway.wishes import Wish, Wishes
from broker.host.tasks import TaskOwner
from broker.metrics import GATEWAY_CONNECTIONS, GATEWAY_EVENTS

__all__ = ["Egress", "GatewayLink", "Provider", "Scheme"]

ACK_TIMEOUT = 5.0
"""Seconds a call waits for the gateway, a redial included."""
PING_S = 2.0
HUNG_S = 15.0
"""A gateway that has not answered for so long is let go (and killed, where it is our child)."""
WINDOW = 32
"""Messages under way at once; bounds the descriptors in flight."""
MAX_PATH = 107
_PEER = struct.Struct("3i")
log = structlog.get_logger(__name__)

Answered = Callable[[dict[str, Any]], None]


class GatewayLink:
    """One gateway process as the broker sees it.

    ``path``: where to listen (``gateway.link``); ``settings`` gives the current section;
    ``on_report`` hears what the gateway tells by itself (refused hosts, usage) as JSON-safe
    facts with ``kind``; it must not block. Only processes of the broker's own user, of
    root, or of ``gateway.user`` are taken for a gateway.
    """

    def __init__(
        self,
        path: Path,
        tasks: TaskOwner,
        *,
        settings: Callable[[], GatewayConfig],
        on_report: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.path = path
        self.peer_pid: int | None = None
        """Of the gateway that is connected, as the kernel says."""
        self.on_hung: Callable[[int], None] | None = None
        """Hears the pid of a gateway that no longer answers."""
        self.spent: Callable[[], Mapping[str, Any]] | None = None
        """What of the budgets is used up now: ``users``, ``teams``, and ``for_s``, the seconds until they are anew."""
        self._tasks = tasks
        self._settings = settings
        self._on_report = on_report
        self._wishes = Wishes()
        self._whole = False
        self._users: set[int] = set()
        self._listener: socket.socket | None = None
        self._peer: PacketSocket | None = None
        self._told = asyncio.Event()
        self._queue: deque[Callable[[], None]] = deque()
        self._awaited: dict[int, Answered] = {}
        self._next_id = 0
        self._answered_at = 0.0
        self._policies: tuple[Mapping[str, Policy], CacheStore] = {}, CacheStore()
        self._stats: dict[str, int] = {}
        self._connects = 0
        self.view: dict[str, Any] = {}
        """``providers`` and ``cache`` as the gateway last told them."""

    @property
    def connected(self) -> bool:
        """A gateway is there and has been told everything."""
        return self._told.is_set()

    # -- life

    async def start(self) -> None:
        """Listens (0600, for a gateway of another user 0660; a stale file replaced). Does not wait for a gateway."""
        user = self._settings().user
        self._users = {0, os.geteuid()} | ({_uid(user)} if user else set())
        self._listener = _listen(self.path, 0o660 if user else 0o600)
        asyncio.get_running_loop().add_reader(self._listener.fileno(), self._accept)
        self._tasks.start(self._ping(), "gateway_ping")

    async def wait_connected(self, timeout: float) -> None:
        """Returns when a gateway is there. Raises ``GATEWAY_DOWN`` after ``timeout`` seconds."""
        try:
            await asyncio.wait_for(self._told.wait(), timeout)
        except TimeoutError as error:
            raise _down(f"no gateway came within {timeout:g} s") from error

    async def close(self) -> None:
        """Stops listening; the gateway goes on serving what it knows."""
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener.fileno())
            self._listener.close()
            self._listener = None
        if self._peer is not None:
            self._peer.close()
        self._wishes.close()

    # -- slots

    async def put_slot(
        self,
        slot: str,
        incarnation: int,
        identity: Mapping[str, str] | None,
        providers: Mapping[str, Provider],
        egress: Egress,
        fds: tuple[int, int] | None = None,
    ) -> None:
        """Serves a slot from now on, or changes how; returns when acknowledged.

        ``fds``: the listening gateway and egress sockets, needed the first time (and after a rebind);
        they are duplicated, the caller keeps its own. ``identity`` None: unclaimed, all requests get
        503. Same incarnation: connections stay; a higher one, or another identity, cuts those of the old.
        Raises ``GATEWAY_DOWN`` when there is no answer in time (the wish stands and is told to the next
        gateway; ``drop_slot`` takes it back) and ``BAD_CONFIG`` when the gateway refuses it.
        """
        entry = SlotEntry(slot, incarnation, identity, providers, egress)
        _check_size(entry)
        await self._carry_out(self._wishes.put(entry, fds))

    async def drop_slot(self, slot: str) -> None:
        """Cuts a slot off: listeners closed, running calls and tunnels aborted; returns when
        acknowledged. Idempotent. Raises ``GATEWAY_DOWN``; then an old gateway may still serve it."""
        await self._carry_out(self._wishes.drop(slot))

    async def table_complete(self) -> None:
        """Call once after ``start``, when every slot of before the restart was put again: a gateway
        that outlived the last broker forgets the others only then. Does not wait for a gateway."""
        self._whole = True
        if self._peer is not None:
            self._enqueue(lambda: self._tell({"type": "whole"}))

    def set_policies(self, policies: Mapping[str, Policy], cache: CacheStore) -> None:
        """How calls to the operator's providers are treated from now on. Does not wait."""
        self._policies = dict(policies), cache
        if self._peer is not None:
            self._enqueue(self._tell_policies)

    async def settings_changed(self) -> None:
        """Tells the gateway the settings of now. Does not wait."""
        if self._peer is not None:
            self._enqueue(self._tell_settings)

    def usage_seen(self, boot: str, upto: int) -> None:
        """Tells the gateway that its records up to number ``upto`` are stored. Does not wait."""
        if self._peer is not None:
            self._enqueue(lambda: self._tell({"type": "usage_seen", "boot": boot, "upto": upto}))

    def budgets_changed(self) -> None:
        """Tells the gateway what is spent now. Does not wait."""
        if self._peer is not None:
            self._enqueue(self._tell_spent)

    def nobody_serves(self) -> None:
        """The gateway process is known to be dead: what was to be taken from it is taken."""
        self._wishes.settle_drops()

    def health(self) -> dict[str, Any]:
        """JSON-safe: connected, pid, slots, connects (how often one came) and the gateway's own counts."""
        return {
            "connected": self.connected,
            "pid": self.peer_pid,
            "slots": len(self._wishes),
            "connects": self._connects,
            **self._stats,
        }

    async def _carry_out(self, wish: Wish) -> None:
        if self._peer is not None:
            self._enqueue(lambda: self._tell_wish(wish))
        try:
            await asyncio.wait_for(asyncio.shield(wish.done), ACK_TIMEOUT)
        except TimeoutError as error:
            raise _down(f"no answer within {ACK_TIMEOUT:g} s") from error

    # -- the gateway that is there

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            log.debug("gateway_accept_failed", error=error.strerror)
            return
        pid, uid, _ = _PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
        if uid not in self._users or self._peer is not None:
            log.warning("gateway_refused", pid=pid, uid=uid, reason="user" if self._peer is None else "second")
            sock.close()
            return
        self.peer_pid = pid
        self._answered_at = asyncio.get_running_loop().time()
        self._peer = PacketSocket(sock, self._received, self._lost)

    def _lost(self, why: str) -> None:
        log.warning("gateway_lost", pid=self.peer_pid, why=why)
        self._peer = None
        self.peer_pid = None
        self._told.clear()
        self._queue.clear()
        self._awaited.clear()
        GATEWAY_CONNECTIONS.set(0)

    def _received(self, message: dict[str, Any], fds: list[int]) -> None:
        for fd in fds:
            os.close(fd)
        match message["type"]:
            case "hello":
                self._greet(message)
            case "ack":
                answered = self._awaited.pop(message.get("id", -1), None)
                self._answered_at = asyncio.get_running_loop().time()
                if answered is not None:
                    answered(message)
                self._pump()
            case "report" if self._on_report is not None:
                self._on_report({key: value for key, value in message.items() if key != "type"})

    def _greet(self, hello: dict[str, Any]) -> None:
        if hello.get("version") != VERSION:
            log.error("gateway_version", theirs=hello.get("version"), ours=VERSION)
            if self._peer is not None:
                self._peer.close("its version differs")
            return
        self._connects += 1
        self._stats = {}
        self._enqueue(self._tell_settings)
        self._enqueue(self._tell_policies)
        self._enqueue(self._tell_spent)
        for wish in self._wishes:
            self._enqueue(lambda wish=wish: self._tell_wish(wish))  # type: ignore[misc]
        if self._whole:
            self._enqueue(lambda: self._tell({"type": "whole"}))
        # Acknowledged in order, so this one's answer says that all before were heard.
        self._enqueue(lambda: self._tell({"type": "ping"}, self._all_told))

    def _all_told(self, answer: dict[str, Any]) -> None:
        log.info("gateway_ready", pid=self.peer_pid, slots=len(self._wishes))
        self._take_stats(answer)
        self._told.set()

    def _tell_settings(self) -> None:
        self._tell({"type": "settings", "settings": asdict(Settings.of(self._settings()))})

    def _tell_policies(self) -> None:
        policies, cache = self._policies
        for name, policy in policies.items():
            self._tell(_sized(name, policy), _log_refusal)
        self._tell({"type": "policies", "cache": msgspec.to_builtins(cache)}, _log_refusal)

    def _tell_spent(self) -> None:
        if self.spent is not None:
            self._tell({"type": "spent", **self.spent()})

    def _tell_wish(self, wish: Wish) -> None:
        if not self._wishes.stands(wish):
            return
        if wish.entry is None:
            self._tell({"type": "drop", "slot": wish.slot}, lambda answer: self._settled(wish, answer))
            return
        self._tell(_put(wish.entry), lambda answer: self._settled(wish, answer), wish.fds or ())

    def _settled(self, wish: Wish, answer: dict[str, Any]) -> None:
        error = answer.get("error")
        if not error:
            self._wishes.heard(wish)
            return
        self._wishes.refused(
            wish,
            CortexError(
                Code.BAD_CONFIG,
                f"The gateway refused: {error.get('what', 'no reason given')}",
                hint=str(error.get("hint", "see the gateway's log")),
            ),
        )

    # -- sending, a window at a time

    def _enqueue(self, tell: Callable[[], None]) -> None:
        self._queue.append(tell)
        self._pump()

    def _pump(self) -> None:
        while self._queue and len(self._awaited) < WINDOW and self._peer is not None:
            self._queue.popleft()()

    def _tell(self, message: dict[str, Any], answered: Answered | None = None, fds: tuple[int, ...] = ()) -> None:
        if self._peer is None:
            return
        self._next_id += 1
        self._awaited[self._next_id] = answered or (lambda _: None)
        self._peer.send({**message, "id": self._next_id}, fds)

    # -- is it alive

    async def _ping(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(PING_S)
            if self._peer is None:
                continue
            if loop.time() - self._answered_at > HUNG_S:
                pid = self.peer_pid
                self._peer.close("it does not answer")
                if pid is not None and self.on_hung is not None:
                    self.on_hung(pid)
            elif self.connected:
                self._enqueue(lambda: self._tell({"type": "ping"}, self._take_stats))

    def _take_stats(self, answer: dict[str, Any]) -> None:
        """Adds what the gateway counted since the last time to the broker's metrics."""
        fresh = {name: int(count) for name, count in dict(answer.get("stats") or {}).items()}
        for name, count in fresh.items():
            if name not in GAUGES:
                GATEWAY_EVENTS.labels(name).inc(max(0, count - self._stats.get(name, 0)))
        GATEWAY_CONNECTIONS.set(fresh.get("connections", 0))
        self._stats = fresh
        self.view = {key: answer.get(key, {}) for key in ("providers", "cache")}
        show_providers(self.view["providers"])


def _uid(user: str) -> int:
    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError as error:
        raise CortexError(
            Code.BAD_CONFIG, f"There is no user {user!r}", hint="set gateway.user to the user that the gateway runs as"
        ) from error


def _listen(path: Path, mode: int) -> socket.socket:
    """Binds beside ``path`` and moves the socket there, so that it is never open to others."""
    aside = path.with_name(path.name + ".new")
    if len(os.fsencode(aside)) > MAX_PATH:
        raise CortexError(
            Code.BAD_CONFIG, f"{path} is too long for a socket", hint="set gateway.link to a shorter path (103 bytes)"
        )
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        aside.unlink(missing_ok=True)
        sock.bind(str(aside))
        aside.chmod(mode)
        sock.listen(4)
        sock.setblocking(False)
        aside.rename(path)
    except OSError as error:
        sock.close()
        raise CortexError(
            Code.BAD_CONFIG, f"Cannot listen on {path}", cause=error.strerror, hint="set gateway.link or runtime_dir"
        ) from error
    return sock


def _log_refusal(answer: dict[str, Any]) -> None:
    if error := answer.get("error"):
        log.error("gateway_policy_refused", error=error.get("what"), hint=error.get("hint"))


def _sized(name: str, policy: Policy) -> dict[str, Any]:
    """The message that tells ``policy``. One that is too large must not stand in the way of all others at every
    hello: it goes without its CA bundle, which is all that can be so large; then no certificate is trusted."""
    message = {"type": "policy", "name": name, "policy": msgspec.to_builtins(policy)}
    try:
        pack({**message, "id": 2**63})
    except MessageError as error:
        log.error("policy_too_large", provider=name, cause=str(error), hint="use a smaller ca_file")
        message["policy"] = msgspec.to_builtins(msgspec.structs.replace(policy, ca="too large"))
    return message


def _put(entry: SlotEntry) -> dict[str, Any]:
    return {"type": "put", **entry_to_wire(entry)}


def _check_size(entry: SlotEntry) -> None:
    """Before it is a wish: one that cannot be sent would stand in the way of all others at every hello."""
    try:
        pack({**_put(entry), "id": 2**63})
    except MessageError as error:
        raise CortexError(
            Code.BAD_CONFIG,
            f"slot {entry.slot}: too much to tell the gateway",
            cause=str(error),
            hint="use smaller CA bundles (only the roots that a provider needs), or fewer egress hosts",
        ) from error


def _down(cause: str) -> CortexError:
    return CortexError(
        Code.GATEWAY_DOWN,
        "The gateway process is not there",
        cause=cause,
        hint='see the gateway\'s log; with gateway.mode = "external" start its unit',
    )
