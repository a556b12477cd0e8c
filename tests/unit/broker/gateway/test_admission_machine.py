"""Whatever callers do in whatever order: never over a limit, everyone is heard once, nothing is left over."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from broker.errors import Code, CortexError
from broker.gateway.admission import LATE_S, Admission, Ticket, Waiting
from broker.gateway.caller import Caller
from broker.gateway.policy import Limit, Limits
from tests.unit.broker.gateway.virtual import VirtualClock

CLOSE = 1e-6
limits = st.builds(
    Limit,
    concurrency=st.sampled_from([0, 0, 1, 2, 3]),
    interval_s=st.sampled_from([0.0, 0.0, 0.025, 5.0]),
    rpm=st.sampled_from([0, 0, 1, 4]),
    tpm=st.sampled_from([0, 0, 100]),
)


@dataclass(eq=False)
class Call:
    """``at``: when it went; ``weight``: its tokens by time, as far as they are known."""

    caller: Caller
    own: str
    tokens: int
    since: float
    quick: bool
    ticket: Ticket | None = None
    waiting: Waiting | None = None
    at: float = 0.0
    heard: int = 0
    cancelled: bool = False
    over: bool = False
    weights: list[list[float]] = field(default_factory=list)

    @property
    def running(self) -> bool:
        return self.ticket is not None and not self.over and not self.cancelled

    def scopes(self) -> list[tuple[str, object]]:
        """Whose limits it counts against."""
        found: list[tuple[str, object]] = [
            ("provider", ""), ("user", self.caller.user), ("sandbox", (self.caller.user, self.caller.slot)),
        ]  # fmt: skip
        if self.own or (self.ticket is not None and self.ticket.key >= 0):
            found.append(("credential", self.own or (self.ticket.key if self.ticket is not None else None)))
        return found


class AdmissionMachine(RuleBasedStateMachine):
    """Callers that ask, leave, end, and are refused upstream, beside a tally of what was let through."""

    @initialize(
        provider=limits, credential=limits, user=limits, sandbox=limits,
        keys=st.integers(0, 3), waiting=st.integers(0, 8), wait_s=st.sampled_from([0.5, 30.0, 300.0]),
    )  # fmt: skip
    def begin(
        self, provider: Limit, credential: Limit, user: Limit, sandbox: Limit, keys: int, waiting: int, wait_s: float
    ) -> None:
        self.clock = VirtualClock()
        self.limits = Limits(
            provider=provider, credential=credential, user=user, sandbox=sandbox, waiting=waiting, wait_s=wait_s
        )
        self.admission = Admission("acme", self.limits, keys, self.clock.call_at, self.clock.now)
        self.calls: list[Call] = []
        self.rests: dict[object, float] = {}
        self.inside = False

    # -- what callers do

    @rule(
        user=st.sampled_from("abc"), slot=st.sampled_from("12"), own=st.sampled_from(["", "", "x", "y"]),
        tokens=st.sampled_from([0, 1, 30, 100, 500]), avoid=st.frozensets(st.integers(0, 2), max_size=3),
        quick=st.booleans(),
    )  # fmt: skip
    def enter(self, user: str, slot: str, own: str, tokens: int, avoid: frozenset[int], quick: bool) -> None:
        call = Call(Caller(slot, user, f"team-{user}"), own, tokens, self.clock.at, quick)

        def granted(ticket: Ticket) -> None:
            assert not self.inside, "told from within a call of enter"
            assert call.waiting is not None
            call.heard += 1
            self.started(call, ticket)
            if call.quick:
                self.end(call, 0)

        def refused(error: CortexError) -> None:
            assert not self.inside, "told from within a call of enter"
            assert call.waiting is not None
            call.heard += 1
            self.readable(error)

        self.inside = True
        try:
            found = self.admission.enter(call.caller, own, tokens, granted, refused, avoid)
        except CortexError as error:
            self.readable(error)
            return
        finally:
            self.inside = False
        self.calls.append(call)
        if isinstance(found, Ticket):
            self.started(call, found)
        else:
            call.waiting = found

    @precondition(lambda self: any(call.running for call in self.calls))
    @rule(data=st.data(), used=st.sampled_from([None, 0, 10, 100, 700]))
    def release(self, data: st.DataObject, used: int | None) -> None:
        call = data.draw(st.sampled_from([call for call in self.calls if call.running]))
        self.end(call, used)
        assert call.ticket is not None
        call.ticket.release(self.clock.at, 5)

    @precondition(lambda self: any(call.running for call in self.calls))
    @rule(data=st.data(), asked=st.sampled_from([None, 0.0, 3.0, 90.0]), overload=st.booleans())
    def upstream_refuses(self, data: st.DataObject, asked: float | None, overload: bool) -> None:
        call = data.draw(st.sampled_from([call for call in self.calls if call.running]))
        assert call.ticket is not None
        who: object = "" if overload else call.own or (call.ticket.key if call.ticket.key >= 0 else "")
        if asked:
            self.rests[who] = max(self.rests.get(who, 0.0), self.clock.at + asked)
        call.ticket.limited(self.clock.at, asked, overload=overload)

    @precondition(lambda self: any(call.waiting and not call.heard for call in self.calls))
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        call = data.draw(st.sampled_from([call for call in self.calls if call.waiting and not call.heard]))
        assert call.waiting is not None
        call.cancelled = True
        call.waiting.cancel()

    @rule(seconds=st.sampled_from([0.001, 0.025, 0.4, 3.0, 31.0, 61.0]))
    def wait(self, seconds: float) -> None:
        self.clock.run(seconds)

    @rule(users=st.frozensets(st.sampled_from("abc"), max_size=2), team=st.booleans(), seconds=st.integers(0, 90))
    def spend(self, users: frozenset[str], team: bool, seconds: int) -> None:
        self.admission.spent(users, {"team-a"} if team else set(), self.clock.at + seconds)
        for call in self.calls:
            gone = seconds and (call.caller.user in users or (team and call.caller.user == "a"))
            assert not (gone and call.waiting and not call.heard and not call.cancelled)

    # -- the tally

    def started(self, call: Call, ticket: Ticket) -> None:
        now = self.clock.at
        call.ticket, call.at = ticket, now
        for who in ("", call.own or (ticket.key if ticket.key >= 0 else "")):
            assert self.rests.get(who, 0.0) <= now, "went while it was asked to rest"
        for scope, name in call.scopes():
            limit: Limit = getattr(self.limits, scope)
            others = [
                each for each in self.calls
                if each is not call and each.ticket is not None and (scope, name) in each.scopes()
            ]  # fmt: skip
            if limit.concurrency:
                assert sum(each.running for each in others) < limit.concurrency
            if limit.interval_s and others:
                assert now - max(each.at for each in others) >= limit.interval_s - CLOSE
            if limit.rpm:
                assert sum(each.at + 60 > now + CLOSE for each in others) < limit.rpm
            if limit.tpm:
                used = sum(amount for each in others for at, amount in each.weights if at + 60 > now + CLOSE)
                assert not call.tokens or used + min(call.tokens, limit.tpm) <= limit.tpm
        call.weights.append([now, call.tokens])

    def end(self, call: Call, used: int | None) -> None:
        assert call.ticket is not None
        call.over = True
        if used is not None and used <= call.tokens:
            call.weights[0][1] = used
        elif used is not None:
            call.weights.append([self.clock.at, used - call.tokens])
        call.ticket.release(self.clock.at, used)

    def readable(self, error: CortexError) -> None:
        assert error.code in (Code.GATEWAY_LIMITED, Code.BUDGET_SPENT)
        assert error.details["retry_after_s"] >= 1
        assert error.details["limit"]
        assert error.hint

    @invariant()
    def counts_agree(self) -> None:
        if not hasattr(self, "admission"):
            return
        for call in self.calls:
            assert call.heard <= (call.waiting is not None)
            assert not (call.cancelled and call.heard)
        waiting = [call for call in self.calls if call.waiting and not call.heard and not call.cancelled]
        assert self.admission.running == sum(call.running for call in self.calls)
        assert self.clock.most <= 1
        for call in waiting:
            assert self.clock.at <= call.since + self.limits.wait_s + 2 * LATE_S
        decided = self.admission.waiting - len(waiting)
        assert decided <= 0
        assert self.admission.waiting <= self.limits.waiting

    def teardown(self) -> None:
        if not hasattr(self, "admission"):
            return
        self.clock.run(self.limits.wait_s + 1)
        for call in self.calls:
            assert call.cancelled or call.waiting is None or call.heard == 1, "everyone was heard"
        for call in self.calls:
            if call.running:
                self.end(call, None)
        self.clock.run_out()
        view = self.admission.view()
        assert (view["running"], view["waiting"], view["waiting_users"], view["watched"]) == (0, 0, 0, 0)


AdmissionMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestAdmission = AdmissionMachine.TestCase
