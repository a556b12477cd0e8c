"""The way out of one slot: what its lists allow, what runs, and what the broker is told of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from broker.errors import Code, CortexError
from broker.gateway import answers
from broker.gateway.addresses import listed
from broker.gateway.context import Context
from broker.gateway.egress_ledger import Hourly, Ledger, Result
from broker.gateway.messages import Egress

REPORT_S = 1.0


class Flow:
    """One tunnel or plain request that the lists allow. Whoever carries it sets ``cut``, by which it can be ended,
    says what moves, and closes it once."""

    __slots__ = ("_closed", "_out", "_settled", "cut", "host", "port", "private", "received", "sent", "tool", "tunnel")

    def __init__(self, out: WayOut, host: str, port: int, tool: str, *, private: bool, tunnel: bool) -> None:
        self.cut: Callable[[], None] = lambda: None
        self.host = host
        self.port = port
        self.tool = tool
        self.private = private
        self.tunnel = tunnel
        self.sent = 0
        self.received = 0
        self._out = out
        self._settled = False
        self._closed = False

    def stands(self) -> None:
        """The host was reached."""
        self._settle("allowed")

    def moved(self, sent: int, received: int) -> None:
        """Bytes, as the sandbox sees it; one over its limit is cut."""
        self.sent += sent
        self.received += received
        self._out.spend(self, sent + received)

    def close(self, error: CortexError | None = None) -> None:
        """It is over; ``error``: because of this. Idempotent."""
        if not self._closed:
            self._closed = True
            refused = error is not None and error.code is Code.EGRESS_ADDRESS
            self._settle("refused_address" if refused else "allowed")
            self._out.ended(self)

    def _settle(self, result: Result) -> None:
        if not self._settled:
            self._settled = True
            self._out.decided(self.host, self.port, result, self.tool)


class WayOut:
    """Decides for each request anew, by what the slot may do now."""

    def __init__(self, slot: str, context: Context) -> None:
        self.egress = Egress()
        self.slot = slot
        self._context = context
        self._clock = asyncio.get_running_loop().time
        self._identity: Mapping[str, str] = {}
        self._ledger = Ledger()
        self._spent = Hourly()
        self._flows: set[Flow] = set()
        self._tunnels = 0
        self._told_at = self._clock() - REPORT_S

    # -- what it may do

    def set(self, egress: Egress, identity: Mapping[str, str] | None) -> None:
        """From now on; what is under way to hosts that are no longer allowed is cut."""
        if (identity or {}) != self._identity:
            self.flush()
            self._ledger.clear()
            before, self._identity = self._identity, dict(identity or {})
            # Settings are the user's to change; what was moved stays moved.
            if self._identity.get("user") != before.get("user"):
                self._spent = Hourly()
        self.egress = egress
        for flow in list(self._flows):
            if not self._allows(flow):
                flow.cut()

    def open(self, host: str, port: int, tool: str, *, tunnel: bool) -> Flow:
        """Raises ``EGRESS_DENIED`` or ``EGRESS_LIMIT``. The flow has to be closed."""
        settings = self._context.settings
        if not listed(host, port, self.egress.hosts):
            self._refused(host, port, "denied", tool)
            raise answers.denied(host, port)
        if tunnel and 0 < settings.max_tunnels_per_sandbox <= self._tunnels:
            self._refused(host, port, "limited", tool)
            raise answers.too_many_tunnels(settings.max_tunnels_per_sandbox)
        wait = self._wait()
        if wait:
            self._refused(host, port, "limited", tool)
            raise answers.spent(settings.egress_bytes_per_hour, wait)
        flow = Flow(self, host, port, tool, private=self._private(host, port), tunnel=tunnel)
        self._flows.add(flow)
        self._tunnels += tunnel
        return flow

    def _allows(self, flow: Flow) -> bool:
        if not listed(flow.host, flow.port, self.egress.hosts):
            return False
        return not flow.private or self._private(flow.host, flow.port)

    def _private(self, host: str, port: int) -> bool:
        return listed(host, port, self.egress.private, default_port=None)

    def _wait(self) -> float:
        limit = self._context.settings.egress_bytes_per_hour
        return self._spent.wait(limit, self._clock()) if limit else 0.0

    # -- what it does

    def spend(self, flow: Flow, count: int) -> None:
        """A flow moved so many bytes."""
        limit = self._context.settings.egress_bytes_per_hour
        if self._spent.add(count, self._clock()) > limit > 0:
            self._refused(flow.host, flow.port, "limited", flow.tool)
            flow.cut()

    def ended(self, flow: Flow) -> None:
        """A flow is over."""
        self._flows.discard(flow)
        self._tunnels -= flow.tunnel
        self._collect(flow)

    # -- what is told

    def decided(self, host: str, port: int, result: Result, tool: str) -> None:
        """Counts, and notes what was refused in the log."""
        if self._ledger.decided(host, port, result, tool) and result != "allowed":
            self._context.note("egress_refused", slot=self.slot, host=host, port=port, result=result, tool=tool)

    def tell(self, now: float) -> None:
        """Every second or so: reports what there is to report."""
        if now - self._told_at >= REPORT_S:
            self.flush()

    def flush(self) -> None:
        """Reports now; what cannot be told is kept."""
        self._told_at = self._clock()
        for flow in self._flows:
            self._collect(flow)
        if not len(self._ledger):
            return
        who = {key: self._identity.get(key, "") for key in ("user", "workspace")}
        if self._context.report({"kind": "egress", "slot": self.slot, **who, "hosts": self._ledger.rows()}):
            self._ledger.clear()

    def _refused(self, host: str, port: int, result: Result, tool: str) -> None:
        self._context.stats.tunnels_denied += 1
        self.decided(host, port, result, tool)

    def _collect(self, flow: Flow) -> None:
        self._ledger.moved(flow.host, flow.port, flow.sent, flow.received)
        flow.sent = flow.received = 0
