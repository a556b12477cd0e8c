"""Whatever sandboxes, servers and operators do in whichever order, a call keeps its promises."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from broker.errors import Code, CortexError
from broker.gateway.call import Call
from broker.gateway.policy import CacheRule, Limit, Limits, Policy
from tests.unit.broker.gateway.calls import Sandbox, Server, World, policy, world

ASK = b'{"model": "m", "temperature": 0, "messages": [{"role": "user", "content": "%d"}]}'
USERS = ("ann", "bob")
STATUSES = (200, 200, 400, 429, 500, 503)
CHOICES = st.lists(st.integers(0, 2**16), min_size=30, max_size=120)


@dataclass
class Made:
    call: Call
    sandbox: Sandbox
    user: str
    rest: list[bytes]
    gone: bool = False
    held: list[bool] = field(default_factory=list)

    @property
    def live(self) -> bool:
        return not self.gone and not self.sandbox.ends


class Play:
    """Does what ``choices`` say, number by number."""

    def __init__(self, at: World, choices: list[int]) -> None:
        self.at = at
        self.choices = iter(choices)
        self.calls: list[Made] = []

    def pick(self, count: int) -> int:
        return next(self.choices) % count

    async def run(self) -> None:
        steps = (
            self.begin, self.begin, self.more, self.leave, self.time_out, self.slow, self.answer, self.answer,
            self.begin_answer, self.go_on, self.lose, self.dialled, self.replace,
        )  # fmt: skip
        try:
            while True:
                steps[self.pick(len(steps))]()
                if self.pick(2):
                    await asyncio.sleep(0)
                self.check()
        except StopIteration:
            return

    # -- sandboxes

    def begin(self) -> None:
        user = USERS[self.pick(2)]
        self.at.slot(q=f"sk-of-{user}")
        body = ASK % self.pick(2)
        cut = self.pick(3) * 20
        framing = "transfer-encoding: chunked" if self.pick(2) else f"content-length: {len(body)}"
        call, sandbox = self.at.call(framing, user=user, name="pqr"[self.pick(3)])
        made = Made(call, sandbox, user, [body[-cut:]] if cut else [])
        self.calls.append(made)
        if len(self.calls) < 8 and self.pick(3) == 0:
            sandbox.then = self.begin_plainly
        call.body([body[:-cut] if cut else body], not cut)
        call.start()

    def begin_plainly(self) -> None:
        self.at.slot(q="sk-of-ann")
        call, sandbox = self.at.call(f"content-length: {len(ASK % 0)}", user="ann")
        self.calls.append(Made(call, sandbox, "ann", []))
        call.body([ASK % 0], True)
        call.start()

    def any_call(self) -> Made | None:
        live = [made for made in self.calls if made.live]
        return live[self.pick(len(live))] if live else None

    def more(self) -> None:
        made = self.any_call()
        if made is not None and made.rest:
            made.call.body([made.rest.pop()], True)

    def leave(self) -> None:
        made = self.any_call()
        if made is not None:
            made.gone = True
            made.call.abort()
            made.sandbox.ends.append("gone")

    def time_out(self) -> None:
        made = self.any_call()
        if made is not None:
            made.call.time_out()

    def slow(self) -> None:
        made = self.any_call()
        if made is not None:
            made.sandbox.congested = not made.sandbox.congested
            made.call.hold_response(made.sandbox.congested)

    # -- servers

    def any_server(self, *, begun: bool) -> Server | None:
        able = [server for server in self.at.network.servers if server.open and server.begun == begun]
        return able[self.pick(len(able))] if able else None

    def answer(self) -> None:
        server = self.any_server(begun=False)
        if server is not None:
            server.answer(STATUSES[self.pick(len(STATUSES))], b"by " + _key(server))

    def begin_answer(self) -> None:
        server = self.any_server(begun=False)
        if server is not None:
            if self.pick(3) == 0:
                server.interim()
            server.head(STATUSES[self.pick(len(STATUSES))])

    def go_on(self) -> None:
        server = self.any_server(begun=True)
        if server is not None:
            server.body(b"by " + _key(server))
            if server.open and self.pick(2):
                server.end()

    def lose(self) -> None:
        server = self.any_server(begun=bool(self.pick(2)))
        if server is not None:
            server.lose()

    def dialled(self) -> None:
        self.at.network.at_once = bool(self.pick(2))
        if self.at.network.dials:
            failed = CortexError(Code.UPSTREAM_UNREACHABLE, "it cannot be reached", hint="none")
            self.at.network.dialled(failed if self.pick(3) == 0 else None)

    def replace(self) -> None:
        if self.pick(4) == 0:
            self.at.context.treat(_policies(1 + self.pick(3)), self.at.context._cache)

    # -- promises

    def check(self) -> None:
        for made in self.calls:
            assert len(made.sandbox.ends) <= 1
            heads = made.sandbox.got.count(b"HTTP/1.1 ") - made.sandbox.got.count(b"HTTP/1.1 103")
            assert heads <= 1, "more than one answer"
            if "finish" in made.sandbox.ends:
                assert heads == 1
            for user in USERS:
                assert user == made.user or b"sk-of-" + user.encode() not in made.sandbox.got
        for server in self.at.network.servers:
            assert server.got.count(b"authorization: ") <= 1
            operators = {"q.example": b"sk-of-", "p1.example": b"sk-p", "p2.example": b"sk-p", "r.example": b"sk-r"}
            assert not server.got or _key(server).startswith(operators[server.origin.host])

    async def end(self) -> None:
        """All sandboxes go away; nothing is left of any."""
        while left := [made for made in self.calls if made.live]:
            for made in left:
                made.gone = True
                made.sandbox.then = lambda: None
                made.call.abort()
                made.sandbox.ends.append("gone")
        for _ in range(5):
            await asyncio.sleep(0)
        self.check()
        assert not any(server.open for server in self.at.network.servers)
        assert not [future for _, future in self.at.network.dials if not future.done()]
        assert self.at.idle()
        assert len(self.at.log.records) == len(self.calls)


def _key(server: Server) -> bytes:
    return server.got.partition(b"authorization: Bearer ")[2].partition(b"\r\n")[0]


def _policies(concurrency: int) -> dict[str, Policy]:
    limits = Limits(provider=Limit(concurrency=concurrency), waiting=4)
    return {
        "p": policy(
            "p1", "p2", keys=("sk-p1", "sk-p2"), fallback=("q", "r"), coalesce=True, cache=CacheRule(enabled=True),
            limits=limits, max_fails=3,
        ),
        "q": policy("q", fallback=("p",), max_fails=2, coalesce=True),
        "r": policy("r", keys=("sk-r",), limits=limits, retries=0, fallback=("q",)),
    }  # fmt: skip


@settings(max_examples=150, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink))
@given(CHOICES)
def test_every_call_ends_once_and_leaves_nothing_behind(choices: list[int]) -> None:
    async def play() -> None:
        async with world(**_policies(2)) as at:
            it = Play(at, choices)
            await it.run()
            await it.end()

    asyncio.run(play())
