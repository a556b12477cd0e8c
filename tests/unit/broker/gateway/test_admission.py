"""Who may call a provider, when, and what the others hear."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import Code, CortexError
from broker.gateway.admission import LATE_S, Admission, Ticket, Waiting
from broker.gateway.caller import Caller
from broker.gateway.policy import Limit, Limits
from tests.unit.broker.gateway.virtual import VirtualClock

DOCUMENT_001 = Limit(concurrency=6, interval_s=0.025)


class Desk:
    """An admission and what its callers heard, in order. ``goes`` may do something when it is told."""

    def __init__(self, limits: Limits, keys: int = 0) -> None:
        self.clock = VirtualClock()
        self.admission = Admission("acme", limits, keys, self.clock.call_at, self.clock.now)
        self.went: list[tuple[str, float]] = []
        self.tickets: dict[str, Ticket] = {}
        self.errors: dict[str, CortexError] = {}

    def call(
        self, name: str, *, slot: str = "", own: str = "", tokens: int = 0, avoid: frozenset[int] = frozenset(),
        goes: Callable[[Ticket], None] | None = None, team: str = "",
    ) -> Ticket | Waiting:  # fmt: skip
        """``name``: user, then anything after a dot."""

        def granted(ticket: Ticket) -> None:
            assert name not in self.tickets
            assert name not in self.errors
            self.went.append((name, self.clock.at))
            self.tickets[name] = ticket
            if goes is not None:
                goes(ticket)

        def refused(error: CortexError) -> None:
            assert name not in self.tickets
            assert name not in self.errors
            self.errors[name] = error

        user = name.partition(".")[0]
        caller = Caller(slot or f"slot-of-{user}", user, team)
        found = self.admission.enter(caller, own, tokens, granted, refused, avoid)
        if isinstance(found, Ticket):
            self.went.append((name, self.clock.at))
            self.tickets[name] = found
        return found

    def over(self, name: str, tokens: int | None = None) -> None:
        self.tickets[name].release(self.clock.at, tokens)

    def refused(self, name: str, **how: str | int) -> CortexError:
        with pytest.raises(CortexError) as caught:
            self.call(name, **how)  # type: ignore[arg-type]
        return caught.value

    @property
    def order(self) -> list[str]:
        return [name for name, _ in self.went]


class TestWithoutLimits:
    def test_everyone_goes_at_once_and_nothing_is_kept(self) -> None:
        desk = Desk(Limits())
        for i in range(100):
            assert isinstance(desk.call(f"ann.{i}"), Ticket)
        assert (desk.admission.running, desk.admission.waiting) == (100, 0)
        for i in range(100):
            desk.over(f"ann.{i}")
            desk.over(f"ann.{i}")
        assert desk.admission.running == 0
        assert desk.admission.view()["watched"] == 0
        assert not desk.clock.set, "no timer is needed"

    def test_a_credential_that_was_refused_rests_alone(self) -> None:
        desk = Desk(Limits())
        desk.call("ann.1", own="anns")
        desk.tickets["ann.1"].limited(desk.clock.at, 7.0)
        desk.over("ann.1")
        assert isinstance(desk.call("ann.2", own="anns"), Waiting)
        assert isinstance(desk.call("bob.1", own="bobs"), Ticket)
        desk.clock.run(6.9)
        assert "ann.2" not in desk.order
        desk.clock.run(0.2)
        assert desk.order[-1] == "ann.2"

    def test_a_provider_that_is_overloaded_rests_for_all(self) -> None:
        desk = Desk(Limits(), keys=2)
        desk.call("ann.1")
        desk.tickets["ann.1"].limited(desk.clock.at, 7.0, overload=True)
        assert isinstance(desk.call("bob.1", own="bobs"), Waiting)
        assert isinstance(desk.call("cid.1"), Waiting)
        desk.clock.run(7 + LATE_S)
        assert set(desk.order[1:]) == {"bob.1", "cid.1"}

    @pytest.mark.parametrize(("answers", "again_s"), [("", 2.0), ("begin", 1.0), ("end", 1.0)])
    @pytest.mark.parametrize("overload", [False, True])
    def test_rests_grow_until_a_call_is_answered(self, answers: str, again_s: float, overload: bool) -> None:
        desk = Desk(Limits(), keys=1)
        desk.call("ann.1")
        desk.tickets["ann.1"].limited(desk.clock.at, None, overload=overload)
        desk.clock.run(1)
        desk.call("ann.2")
        desk.call("ann.3")
        if answers == "begin":
            desk.tickets["ann.2"].answered()
        elif answers:
            desk.over("ann.2")
        desk.tickets["ann.3"].limited(desk.clock.at, None, overload=overload)
        desk.call("ann.4")
        desk.clock.run(again_s - 0.1)
        assert "ann.4" not in desk.tickets
        desk.clock.run(0.2)
        assert "ann.4" in desk.tickets

    def test_a_provider_without_a_credential_rests_itself(self) -> None:
        desk = Desk(Limits())
        desk.call("ann.1")
        desk.tickets["ann.1"].limited(desk.clock.at, None)
        assert isinstance(desk.call("bob.1"), Waiting)
        desk.clock.run(1 + LATE_S)
        assert desk.order[-1] == "bob.1"

    def test_it_is_as_before_when_the_rest_is_over(self) -> None:
        desk = Desk(Limits())
        desk.call("ann.1", own="anns")
        desk.tickets["ann.1"].limited(desk.clock.at, 7.0)
        desk.over("ann.1")
        desk.clock.run_out()
        assert desk.admission.view()["watched"] == 0
        before = desk.clock.set
        assert isinstance(desk.call("ann.2", own="anns"), Ticket)
        assert desk.clock.set == before

    def test_a_rest_that_outlasts_the_patience_is_said_at_once_to_those_who_wait_too(self) -> None:
        desk = Desk(Limits(provider=Limit(concurrency=1)))
        desk.call("ann.1", own="anns")
        desk.call("ann.2", own="anns")
        desk.call("bob.1", own="bobs")
        desk.tickets["ann.1"].limited(desk.clock.at, 3600.0)
        assert desk.errors["ann.2"].details == {"retry_after_s": 3600, "limit": "credential.pause"}
        assert desk.refused("ann.3", own="anns").code is Code.GATEWAY_LIMITED
        desk.over("ann.1")
        assert desk.order == ["ann.1", "bob.1"]


class TestLimits:
    def test_document_001(self) -> None:
        desk = Desk(Limits(provider=DOCUMENT_001))
        for i in range(12):
            desk.call(f"u{i}")
        desk.clock.run(1)
        assert (desk.admission.running, desk.admission.waiting) == (6, 6)
        starts = [at for _, at in desk.went]
        gaps = [late - early for early, late in pairwise(starts)]
        assert all(0.025 <= round(gap, 9) <= 0.027 for gap in gaps)
        for i in range(6):
            desk.over(f"u{i}")
        desk.clock.run(1)
        assert desk.order == [f"u{i}" for i in range(12)]
        assert desk.clock.most == 1, "one timer at a time"
        assert desk.clock.set <= 13, "one for each that waited, and one for the deadline"

    @pytest.mark.parametrize("scope", ["provider", "credential", "user", "sandbox"])
    @pytest.mark.parametrize(
        ("limit", "words"),
        [
            (Limit(concurrency=1), "1 at once"),
            (Limit(interval_s=40), "one every 40 s"),
            (Limit(rpm=1), "1 a minute"),
            (Limit(tpm=100), "100 tokens a minute"),
        ],
    )
    def test_each_is_named_in_its_refusal(self, scope: str, limit: Limit, words: str) -> None:
        desk = Desk(msgspec.structs.replace(Limits(), **{scope: limit}), keys=1)
        desk.call("ann.1", tokens=100)
        field = next(name for name in ("concurrency", "interval_s", "rpm", "tpm") if getattr(limit, name))
        if field == "concurrency":
            desk.call("ann.2", tokens=1)
            desk.clock.run(30 + LATE_S)
            error = desk.errors["ann.2"]
            assert error.cause == "waited 30 s"
        else:
            desk.over("ann.1")
            error = desk.refused("ann.2", tokens=1)
            assert error.details["retry_after_s"] == (40 if field == "interval_s" else 60)
        assert words in error.what
        assert f"gateway.providers.acme.limits.{scope}.{field}" in error.hint
        assert error.details["limit"] == f"{scope}.{field}"

    def test_one_sandbox_at_its_limit_holds_neither_another_of_its_user_nor_another_user(self) -> None:
        desk = Desk(Limits(sandbox=Limit(concurrency=1)))
        desk.call("ann.1", slot="a")
        desk.call("ann.2", slot="a")
        assert isinstance(desk.call("ann.3", slot="b"), Ticket)
        assert isinstance(desk.call("bob.1"), Ticket)
        desk.over("ann.3")
        assert "ann.2" not in desk.tickets
        desk.over("ann.1")
        assert "ann.2" in desk.tickets

    def test_those_who_have_gone_are_forgotten(self) -> None:
        desk = Desk(Limits(user=Limit(rpm=5), sandbox=Limit(tpm=5), credential=Limit(rpm=3)))
        for i in range(50):
            desk.call(f"u{i}", own=f"o{i}", tokens=3)
            desk.over(f"u{i}")
        assert desk.admission.view()["watched"] == 150
        desk.clock.run_out()
        assert desk.admission.view()["watched"] == 0

    def test_a_slot_that_changed_hands_begins_anew(self) -> None:
        desk = Desk(Limits(sandbox=Limit(rpm=1)))
        desk.call("ann.1", slot="a")
        assert isinstance(desk.call("bob.1", slot="a"), Ticket)

    def test_tokens_are_reserved_then_settled(self) -> None:
        desk = Desk(Limits(user=Limit(tpm=1000), wait_s=600))
        desk.call("ann.1", tokens=900)
        assert isinstance(desk.call("ann.2", tokens=500), Waiting)
        desk.over("ann.1", 400)
        assert "ann.2" in desk.tickets
        desk.over("ann.2", None)
        assert isinstance(desk.call("ann.3", tokens=101), Waiting)
        desk.clock.run(60 + LATE_S)
        assert "ann.3" in desk.tickets

    def test_tokens_that_may_be_given_back_are_waited_for(self) -> None:
        desk = Desk(Limits(user=Limit(tpm=1000), wait_s=20))
        desk.call("ann.1", tokens=900)
        desk.call("ann.2", tokens=500)
        desk.clock.run(20 + LATE_S)
        assert desk.errors["ann.2"].details == {"retry_after_s": 40, "limit": "user.tpm"}
        desk.over("ann.1")
        assert desk.refused("ann.3", tokens=500).details["limit"] == "user.tpm"

    def test_a_large_call_is_not_starved_by_small_ones(self) -> None:
        desk = Desk(Limits(provider=Limit(tpm=1000)))
        desk.call("ann.1", tokens=600)
        desk.clock.run(40)
        desk.call("big.1", tokens=900)
        for i in range(5):
            assert isinstance(desk.call(f"u{i}", tokens=10), Waiting)
        desk.clock.run(20 + LATE_S)
        assert desk.order == ["ann.1", "big.1", *(f"u{i}" for i in range(5))]

    def test_nor_by_small_ones_of_its_user_or_with_the_same_keys(self) -> None:
        for limits in (Limits(user=Limit(tpm=1000)), Limits(credential=Limit(tpm=1000))):
            desk = Desk(limits, keys=1)
            desk.call("ann.1", slot="a", tokens=600)
            desk.call("ann.2", slot="a", tokens=900)
            other = "ann.3" if limits.user.any else "bob.1"
            assert isinstance(desk.call(other, slot="b", tokens=10), Waiting)
            assert isinstance(desk.call("cid.1", own="cids", tokens=10), Ticket)
            desk.over("ann.1", 0)
            assert desk.order == ["ann.1", "cid.1", "ann.2", other]

    def test_two_users_with_one_credential_share_its_limit(self) -> None:
        desk = Desk(Limits(credential=Limit(concurrency=1)))
        desk.call("ann.1", own="team")
        desk.call("bob.1", own="team")
        assert isinstance(desk.call("cid.1", own="cids"), Ticket)
        desk.over("ann.1")
        assert "bob.1" in desk.tickets


class TestKeys:
    def test_calls_are_shared_out_evenly(self) -> None:
        desk = Desk(Limits(), keys=3)
        for i in range(9):
            desk.call(f"u{i}")
        assert [desk.tickets[f"u{i}"].key for i in range(9)] == [0, 1, 2] * 3
        desk.over("u1")
        desk.call("v")
        assert desk.tickets["v"].key == 1

    def test_own_credentials_take_none(self) -> None:
        desk = Desk(Limits(), keys=3)
        desk.call("ann", own="anns")
        assert desk.tickets["ann"].key == -1

    def test_a_key_that_was_refused_rests_and_the_others_go_on(self) -> None:
        desk = Desk(Limits(), keys=2)
        desk.call("ann.1")
        desk.tickets["ann.1"].limited(desk.clock.at, 5.0)
        desk.over("ann.1")
        desk.call("ann.2", avoid=frozenset({0}))
        assert desk.tickets["ann.2"].key == 1
        desk.tickets["ann.2"].limited(desk.clock.at, 9.0)
        desk.call("ann.3")
        desk.clock.run(5 + LATE_S)
        assert desk.tickets["ann.3"].key == 0

    def test_who_avoids_a_key_lets_others_have_it(self) -> None:
        desk = Desk(Limits(credential=Limit(concurrency=1)), keys=2)
        desk.call("x.1")
        desk.call("x.2")
        desk.tickets["x.2"].limited(desk.clock.at, 20.0)
        desk.call("ann.1", avoid=frozenset({0}))
        desk.call("bob.1")
        desk.over("x.1")
        desk.over("x.2")
        assert desk.order == ["x.1", "x.2", "bob.1"]

    def test_users_with_their_own_credential_go_by_while_all_keys_rest(self) -> None:
        desk = Desk(Limits(provider=Limit(concurrency=2)), keys=1)
        desk.call("ann.1")
        desk.tickets["ann.1"].limited(desk.clock.at, 20.0)
        desk.call("ann.2")
        desk.call("bob.1", own="bobs")
        assert desk.order == ["ann.1", "bob.1"]
        assert desk.admission.view()["keys"] == [{"running": 1, "resting_s": 20.0}]


class TestFairness:
    @given(
        flood=st.integers(1, 60),
        servers=st.integers(1, 6),
        before=st.integers(0, 30),
        interval=st.sampled_from([0.0, 0.025]),
    )
    def test_a_flood_delays_another_user_by_one_slot(
        self, flood: int, servers: int, before: int, interval: float
    ) -> None:
        desk = Desk(Limits(provider=Limit(concurrency=servers, interval_s=interval), wait_s=1e6))

        def finish_one() -> None:
            desk.clock.run(1)
            name = next((name for name in desk.order if name not in over), None)
            if name is not None:
                over.add(name)
                desk.over(name)

        over: set[str] = set()
        for i in range(flood):
            desk.call(f"flood.{i}")
        for _ in range(before):
            finish_one()
        seen = len(desk.order)
        desk.call("bob")
        for _ in range(flood + 1):
            finish_one()
        assert desk.order[seen:].index("bob") <= 1
        flooding = [name for name in desk.order if name != "bob"]
        assert flooding == [f"flood.{i}" for i in range(flood)], "in the order they came"

    def test_users_take_turns(self) -> None:
        desk = Desk(Limits(provider=Limit(concurrency=1)))
        desk.call("x")
        for name in ("ann.1", "ann.2", "ann.3", "bob.1", "bob.2", "cid.1"):
            desk.call(name)
        for _ in range(6):
            desk.over(desk.order[-1])
        assert desk.order[1:] == ["ann.1", "bob.1", "cid.1", "ann.2", "bob.2", "ann.3"]

    def test_calls_of_one_user_go_in_the_order_they_came_whatever_the_sandbox(self) -> None:
        desk = Desk(Limits(provider=Limit(concurrency=1)))
        desk.call("x")
        for i, slot in enumerate("aabab"):
            desk.call(f"ann.{i}", slot=slot)
        for _ in range(5):
            desk.over(desk.order[-1])
        assert desk.order[1:] == [f"ann.{i}" for i in range(5)]

    def test_a_full_queue_is_shared_too(self) -> None:
        desk = Desk(Limits(provider=Limit(concurrency=1), waiting=4))
        desk.call("x")
        for i in range(4):
            desk.call(f"flood.{i}")
        error = desk.refused("flood.4")
        assert (error.code, error.details) == (Code.GATEWAY_LIMITED, {"retry_after_s": 1, "limit": "waiting"})
        assert isinstance(desk.call("bob.1"), Waiting)
        assert not desk.errors, "never from within another's call"
        desk.clock.run(LATE_S)
        assert list(desk.errors) == ["flood.3"]
        assert isinstance(desk.call("bob.2"), Waiting)
        assert desk.refused("bob.3").details["limit"] == "waiting"
        assert desk.admission.waiting == 4

    def test_nobody_waits_where_none_may(self) -> None:
        desk = Desk(Limits(provider=Limit(concurrency=1), waiting=0))
        desk.call("ann")
        assert desk.refused("bob").code is Code.GATEWAY_LIMITED
        assert desk.admission.waiting == 0


class TestBudgets:
    def test_who_has_used_it_up_is_refused_until_then(self) -> None:
        desk = Desk(Limits())
        desk.admission.spent(["ann"], ["red"], desk.clock.at + 7200)
        error = desk.refused("ann.1")
        assert (error.code, error.details["retry_after_s"]) == (Code.BUDGET_SPENT, 7200)
        assert "user" in error.what
        assert "2 hours" in error.hint
        assert "team" in desk.refused("bob.1", team="red").what
        assert isinstance(desk.call("bob.2", team="blue"), Ticket)
        desk.clock.run(7200)
        assert isinstance(desk.call("ann.2"), Ticket)

    def test_who_waits_is_refused_too_and_a_new_word_takes_the_place_of_the_old(self) -> None:
        desk = Desk(Limits(provider=Limit(concurrency=1)))
        desk.call("x")
        desk.call("ann.1")
        desk.call("bob.1")
        desk.admission.spent(["ann"], [], desk.clock.at + 60)
        assert desk.errors["ann.1"].code is Code.BUDGET_SPENT
        desk.over("x")
        assert desk.order == ["x", "bob.1"]
        desk.admission.spent([], [], desk.clock.at)
        assert isinstance(desk.call("ann.2"), Waiting)


class TestWaiting:
    def test_who_is_cancelled_hears_nothing_and_lets_the_next_by(self) -> None:
        desk = Desk(Limits(provider=Limit(tpm=100)))
        desk.call("x", tokens=50)
        waits = desk.call("ann.1", tokens=100)
        desk.call("bob.1", tokens=50)
        assert isinstance(waits, Waiting)
        waits.cancel()
        waits.cancel()
        assert desk.order == ["x", "bob.1"]
        desk.clock.run(100)
        assert "ann.1" not in desk.order
        assert not desk.errors

    def test_and_the_next_of_its_own_user(self) -> None:
        desk = Desk(Limits(user=Limit(tpm=100), wait_s=100))
        desk.call("ann.1", tokens=40)
        waits = desk.call("ann.2", slot="a", tokens=100)
        desk.call("ann.3", slot="b", tokens=50)
        assert isinstance(waits, Waiting)
        assert "ann.3" not in desk.order
        waits.cancel()
        assert "ann.3" in desk.order

    def test_one_that_is_told_may_cancel_another_whose_turn_it_is_as_well(self) -> None:
        desk = Desk(Limits(provider=Limit(tpm=100)))
        waits: list[Ticket | Waiting] = []

        def first(ticket: Ticket) -> None:
            waited = waits[0]
            assert isinstance(waited, Waiting)
            waited.cancel()

        desk.call("x", tokens=100)
        desk.call("ann.1", tokens=50, goes=first)
        waits.append(desk.call("bob.1", tokens=50))
        desk.over("x", 0)
        assert desk.order == ["x", "ann.1"]
        assert desk.admission.running == 1
        assert isinstance(desk.call("cid.1", tokens=50), Ticket), "its tokens are free again"

    def test_one_that_waited_too_long_lets_the_next_by(self) -> None:
        desk = Desk(Limits(provider=Limit(tpm=100), wait_s=5))
        desk.call("x", tokens=50)
        desk.call("ann.1", tokens=100)
        desk.clock.run(1)
        desk.call("bob.1", tokens=50)
        desk.clock.run(4 + LATE_S)
        assert "ann.1" in desk.errors
        assert desk.order == ["x", "bob.1"]

    def test_who_goes_at_once_past_others_needs_no_timer(self) -> None:
        desk = Desk(Limits(user=Limit(concurrency=1)))
        desk.call("ann.1")
        desk.call("ann.2")
        assert isinstance(desk.call("bob.1"), Ticket)
        assert [timer.at for timer in desk.clock.pending] == [desk.clock.at + 30 + LATE_S]

    def test_those_who_are_over_as_they_begin_do_not_pile_up(self) -> None:
        desk = Desk(Limits(provider=Limit(concurrency=1), waiting=5000))
        desk.call("x")
        for i in range(5000):
            desk.call(f"u{i}", goes=lambda ticket: ticket.release(desk.clock.at, 0))
        desk.over("x")
        assert len(desk.order) == 5001
        assert desk.admission.running == 0

    def test_one_that_raises_as_it_is_told_keeps_nothing_from_the_next(self) -> None:
        desk = Desk(Limits(provider=Limit(tpm=100)))

        def broken(_: Ticket) -> None:
            raise ValueError("told")

        desk.call("x", tokens=100)
        desk.call("ann.1", tokens=50, goes=broken)
        desk.call("bob.1", tokens=50)
        with pytest.raises(ValueError, match="told"):
            desk.over("x", 0)
        desk.clock.run(LATE_S)
        assert desk.order[-1] == "bob.1"

    def test_a_late_timer_does_not_tell_anyone_from_within_a_call_of_another(self) -> None:
        desk = Desk(Limits(provider=Limit(rpm=1), sandbox=Limit(concurrency=5), wait_s=100))
        desk.call("ann.1")
        desk.call("ann.2")
        desk.clock.at += 61
        assert isinstance(desk.call("bob.1"), Waiting)
        assert desk.order == ["ann.1"]
        desk.clock.run(0.001)
        assert desk.order == ["ann.1", "ann.2"]

    def test_a_clock_that_steps_back_strands_nobody(self) -> None:
        desk = Desk(Limits(user=Limit(rpm=1), wait_s=1e9))
        desk.clock.at = 9e6
        desk.call("ann.1")
        desk.over("ann.1")
        desk.call("ann.2")
        desk.clock.timers.clear()
        desk.clock.at = 1000.0
        desk.call("bob.1")
        desk.clock.run(61)
        assert desk.order[-1] == "ann.2"
