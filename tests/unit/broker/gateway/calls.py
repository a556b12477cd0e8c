"""What a call has around it, without sockets: a pool whose servers are played by the test, and a sandbox."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, cast

from broker.errors import CortexError
from broker.gateway.call import Call
from broker.gateway.caller import Caller, endpoint_of
from broker.gateway.context import Context
from broker.gateway.framing import Body, response_body
from broker.gateway.heads import ResponseHead, parse_request
from broker.gateway.messages import Provider
from broker.gateway.policy import CacheStore, Policy
from broker.gateway.records import Record
from broker.gateway.routes import Origin, Route, compile_routes
from broker.gateway.upstream import Pool
from broker.gateway.usage_log import UsageLog
from broker.host.tasks import TaskOwner

CHAT = "/v1/chat/completions"


class Server:
    """A provider's side of one connection, played by the test."""

    def __init__(self, origin: Origin, *, fresh: bool = True, small: bool = False) -> None:
        self.origin = origin
        self.fresh = fresh
        self.small = small
        self.request_done = True
        self.method = b""
        self.got = b""
        self.held = False
        self.aborted = False
        self.begun = False
        self.sink: Call | None = None
        self._body: Body | None = None

    def begin(self, sink: Call, method: bytes) -> None:
        assert not self.aborted, "a dead connection is used"
        assert self.sink is None, "a connection is used twice"
        self.sink, self.method, self.request_done = sink, method, False

    def write(self, parts: list[bytes]) -> None:
        assert not self.aborted, "written to a dead connection"
        self.got += b"".join(parts)
        if self.small and self.sink is not None:
            self.sink.upstream_congested(True)

    def hold(self, held: bool) -> None:
        self.held = held

    def abort(self) -> None:
        self.aborted = True
        self.sink = None

    @property
    def open(self) -> bool:
        return self.sink is not None

    # -- what the provider does

    def interim(self, status: int = 103) -> None:
        assert self.sink is not None
        self.sink.upstream_interim(ResponseHead(status, b"", [], None, False, True, None, frozenset()))

    def head(self, status: int = 200, length: int | None = None, **headers: str) -> None:
        """``length`` None: chunked."""
        sink = self.sink
        assert sink is not None
        self.begun = True
        lines = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        head = ResponseHead(status, b"", lines, length, length is None, True, None, frozenset())
        self._body = response_body(status, self.method, length, length is None)
        sink.upstream_head(head, self._body)
        if self._body.done and self.open:
            self._finish()
        sink.upstream_flush()

    def body(self, piece: bytes) -> None:
        assert self.sink is not None
        self.sink.upstream_body([piece])
        self.sink.upstream_flush()

    def end(self) -> None:
        if self._body is not None:
            self._body.done = True
        self._finish()

    def answer(self, status: int = 200, body: bytes = b"{}", **headers: str) -> None:
        self.head(status, len(body), **headers)
        if self.open:
            self.body(body)
            self._finish()

    def lose(self, why: str = "reset") -> None:
        sink, self.sink = self.sink, None
        self.aborted = True
        assert sink is not None
        sink.upstream_lost(why)
        sink.upstream_flush()

    def _finish(self) -> None:
        sink, self.sink = self.sink, None
        if sink is not None:
            sink.upstream_end()


class Network:
    """The pool. ``idle``: kept connections; ``dials``: who waits for a new one."""

    def __init__(self) -> None:
        self.idle: list[Server] = []
        self.dials: list[tuple[Origin, asyncio.Future[Server]]] = []
        self.servers: list[Server] = []
        self.at_once = True
        self.small = False

    def take(self, origin: Origin) -> Server | None:
        for server in self.idle:
            if server.origin == origin:
                self.idle.remove(server)
                self.servers.append(server)
                return server
        return self.connect(origin) if self.at_once else None

    def connect(self, origin: Origin) -> Server:
        server = Server(origin, small=self.small)
        self.servers.append(server)
        return server

    async def dial(self, origin: Origin, *, wait_s: float | None = None) -> Server:
        future: asyncio.Future[Server] = asyncio.get_running_loop().create_future()
        self.dials.append((origin, future))
        return await future

    def dialled(self, error: CortexError | None = None) -> None:
        origin, future = self.dials.pop(0)
        if future.done():
            return
        if error is None:
            future.set_result(self.connect(origin))
        else:
            future.set_exception(error)

    def paid_with(self, key: bytes) -> Server:
        """The server that was asked with ``key`` last."""
        return next(server for server in reversed(self.servers) if key in server.got)

    @property
    def last(self) -> Server:
        return self.servers[-1]


class Sandbox:
    """A connection of a sandbox. ``ends``: how its calls ended."""

    def __init__(self) -> None:
        self.congested = False
        self.closing_soon = False
        self.got = b""
        self.held = False
        self.ends: list[str | CortexError] = []
        self.then: Callable[[], object] = lambda: None
        """What the client does at once when its call has ended."""

    def send(self, parts: list[bytes]) -> None:
        assert not self.ends, "something is sent after the end"
        self.got += b"".join(parts)

    def hold(self, held: bool) -> None:
        self.held = held

    def touch(self) -> None: ...

    def fail(self, error: CortexError) -> None:
        self.ends.append(error)
        self.then()

    def cut(self) -> None:
        self.ends.append("cut")

    def finish(self, keep_alive: bool) -> None:
        self.ends.append("finish")
        self.then()


class _Log:
    def __init__(self) -> None:
        self.records: list[Record] = []

    def add(self, record: Record) -> None:
        self.records.append(record)

    def close(self) -> None: ...


class World:
    """A gateway with providers by name; ``ask`` makes a call of a sandbox."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.network = Network()
        self.context.pool = cast(Pool, self.network)
        self.log = _Log()
        self.context.usage = cast(UsageLog, self.log)
        self.routes: dict[bytes, Route] = {}

    def use(self, **policies: Policy) -> None:
        self.context.treat(policies, CacheStore())
        self.slot()

    def slot(self, **credentials: str) -> None:
        """What the slot brings itself: a key by provider, ``PASS`` for what its CLI has."""
        keys = {name: key for name, key in credentials.items() if key != "PASS"}
        named = {name: plan.policy for name, plan in self.context.plans._named.items()}
        self.routes = compile_routes(
            {
                name: Provider(
                    policy.kind, policy.upstreams[0], keys.get(name, ""),
                    policy=name, scheme="passthrough" if credentials.get(name) == "PASS" else "key",
                )
                for name, policy in named.items()
            }
        )  # fmt: skip

    def call(
        self, *lines: str, target: str = CHAT, method: str = "POST", user: str = "ann", name: str = "p"
    ) -> tuple[Call, Sandbox]:
        """A call that has not been started."""
        raw = "\r\n".join((f"{method} {target} HTTP/1.1", "host: g", *lines, "", "")).encode()
        sandbox = Sandbox()
        head = parse_request(raw)
        call = Call(
            sandbox, head, self.routes[name.encode()], target.encode(), self.context, caller=Caller("slot", user),
            endpoint=endpoint_of(head.method, target.encode()), routes=self.routes,
        )  # fmt: skip
        return call, sandbox

    def ask(self, body: bytes = b"{}", *lines: str, **rest: Any) -> tuple[Call, Sandbox]:
        """A call with its whole body."""
        call, sandbox = self.call(f"content-length: {len(body)}", *lines, **rest)
        if body:
            call.body([body], True)
        call.start()
        return call, sandbox

    def running(self) -> Mapping[str, tuple[int, int, int]]:
        """By provider: calls that hold a ticket, wait for one, or are at a server."""
        now = self.context.clock()
        return {
            name: (
                plan.admission.running, plan.admission.waiting,
                sum(server["running"] for server in plan.balance.view(now)),
            )
            for name, plan in self.context.plans._named.items()
        }  # fmt: skip

    def idle(self) -> bool:
        """Nothing is held by anybody."""
        flights = [len(plan.flights) for plan in self.context.plans._named.values() if plan.flights is not None]
        return all(held == (0, 0, 0) for held in self.running().values()) and not any(flights)


@asynccontextmanager
async def world(**policies: Policy) -> AsyncIterator[World]:
    tasks = TaskOwner("test")
    made = World(Context(tasks))
    if policies:
        made.use(**policies)
    try:
        yield made
    finally:
        made.context.plans.close()
        await tasks.close()


def policy(*hosts: str, **rest: Any) -> Policy:
    urls = tuple(f"http://{host}.example" for host in hosts or ("a",))
    return Policy(kind="openai", upstreams=urls, **rest)
