"""A call's ways to its end, with servers and a sandbox played by the test."""

from __future__ import annotations

import asyncio
import json

import pytest

from broker.errors import Code, CortexError
from broker.gateway.policy import CacheRule, Limit, Limits
from tests.unit.broker.gateway.calls import CHAT, Sandbox, Server, policy, world

ASK = json.dumps({"model": "m", "temperature": 0, "messages": []}).encode()
DOWN = CortexError(Code.UPSTREAM_UNREACHABLE, "a cannot be reached", hint="retry")


def failed(sandbox: Sandbox) -> Code:
    (error,) = sandbox.ends
    assert isinstance(error, CortexError)
    return error.code


async def turn() -> None:
    """All that is due has run."""
    for _ in range(5):
        await asyncio.sleep(0)


# Stand-ins


@pytest.mark.parametrize("status", [429, 503])
async def test_providers_that_stand_in_for_each_other_are_asked_once_each(status: int) -> None:
    async with world(p=policy("a", fallback=("q",)), q=policy("b", fallback=("p",))) as at:
        _, sandbox = at.ask(ASK)
        for _ in range(2):
            at.network.last.answer(status, b"no")
        assert [server.origin.host for server in at.network.servers] == ["a.example", "b.example"]
        assert sandbox.got.startswith(b"HTTP/1.1 %d" % status)
        assert sandbox.ends == ["finish"]
        assert at.idle()


async def test_providers_that_stand_in_for_each_other_and_are_all_down_are_not_asked() -> None:
    async with world(
        p=policy("a", fallback=("q",), max_fails=1, retries=0), q=policy("b", fallback=("p",), max_fails=1, retries=0)
    ) as at:
        at.ask(ASK)
        at.network.last.lose()
        at.network.last.lose()
        _, sandbox = at.ask(ASK)
        assert failed(sandbox) is Code.UPSTREAM_BUSY
        assert len(at.network.servers) == 2


@pytest.mark.parametrize("accepted", ["br", "zstd, identity;q=0", "br;q=1, *;q=0"])
@pytest.mark.parametrize("scheme", ["", "PASS"])
async def test_no_answer_escapes_the_meter_by_what_the_sandbox_accepts(accepted: str, scheme: str) -> None:
    async with world(p=policy()) as at:
        if scheme:
            at.slot(p=scheme)
        _, sandbox = at.ask(ASK, f"Accept-Encoding: {accepted}")
        assert at.network.last.got.count(b"ccept-") == at.network.last.got.count(b"accept-encoding: identity\r\n") == 1
        at.network.last.answer(200, b"packed", content_type="application/json", content_encoding="br")
        assert sandbox.got.endswith(b"content-encoding: br\r\ncontent-length: 6\r\n\r\npacked")
        assert at.context.stats.unread == 1


SAYS_NOTHING = b'data: {"model":"m","choices":[{"delta":{"content":"twelve bytes"}}]}\n\n'


@pytest.mark.parametrize("ends", ["end", "lose", "abort"])
async def test_a_stream_that_does_not_say_what_it_used_is_estimated(ends: str) -> None:
    async with world(p=policy("a", limits=Limits(user=Limit(tpm=1000)))) as at:
        call, _ = at.ask(b'{"model":"m","stream":true}' + b" " * 373)
        at.network.last.head(200, content_type="text/event-stream")
        at.network.last.body(SAYS_NOTHING)
        call.abort() if ends == "abort" else getattr(at.network.last, ends)()
        (record,) = at.log.records
        assert (record.model, record.input, record.output, record.estimated) == ("m", 100, 3, True)
        assert at.context.plans._named["p"].admission._gates._users["ann"].used_tokens == 103


@pytest.mark.parametrize("ends", ["answered 400", "answered 500", "lose", "abort"])
async def test_a_call_that_was_not_answered_costs_nothing(ends: str) -> None:
    async with world(p=policy(retries=0)) as at:
        call, _ = at.ask(ASK)
        if ends.startswith("answered"):
            at.network.last.answer(int(ends[-3:]))
        else:
            call.abort() if ends == "abort" else at.network.last.lose()
        (record,) = at.log.records
        assert (record.input, record.output, record.estimated) == (None, None, False)


async def test_what_a_cli_brought_for_one_provider_is_not_told_to_another() -> None:
    async with world(p=policy("a", fallback=("q", "r")), q=policy("b"), r=policy("c", keys=("sk-r",))) as at:
        at.slot(p="PASS", q="PASS")
        at.ask(ASK, "authorization: Bearer mine", target=f"{CHAT}?key=mine&alt=sse")
        assert at.network.last.got.count(b"mine") == 2
        at.network.last.answer(503)
        assert at.network.last.origin.host == "c.example"
        assert b"mine" not in at.network.last.got
        assert b"Bearer sk-r" in at.network.last.got
        assert b"?alt=sse " in at.network.last.got


async def test_an_answer_that_somebody_else_pays_for_is_shared_with_nobody() -> None:
    first = policy("a", "a2", keys=("sk-p",), fallback=("q",), retries=0, coalesce=True, cache=CacheRule(enabled=True))
    async with world(p=first, q=policy("b")) as at:
        at.slot(q="sk-of-ann")
        _, ann = at.ask(ASK, user="ann")
        at.slot(q="sk-of-bob")
        _, bob = at.ask(ASK, user="bob")
        await turn()
        (server,) = at.network.servers
        server.answer(503)
        anns, bobs = at.network.paid_with(b"sk-of-ann"), at.network.paid_with(b"sk-p")
        anns.answer(200, b'{"for": "ann"}')
        bobs.answer(503)
        at.network.paid_with(b"sk-of-bob").answer(200, b'{"for": "bob"}')
        assert b"ann" in ann.got
        assert b"bob" in bob.got
        assert b"ann" not in bob.got
        _, eve = at.ask(ASK, user="eve")
        assert not eve.got, "kept as what the operator paid for"


# Bodies


async def test_who_waits_for_a_word_before_the_body_gets_it_where_the_body_decides() -> None:
    async with world(p=policy("a", coalesce=True)) as at:
        call, sandbox = at.call(f"content-length: {len(ASK)}", "expect: 100-continue")
        call.start()
        assert sandbox.got == b"HTTP/1.1 100 Continue\r\n\r\n"
        call.body([ASK], True)
        at.network.last.answer()
        assert sandbox.got.count(b"100 Continue") == 1
        assert sandbox.ends == ["finish"]


async def test_one_word_before_the_body_whichever_server_gets_it() -> None:
    async with world(p=policy("a", "b")) as at:
        call, sandbox = at.call(f"content-length: {len(ASK)}", "expect: 100-continue")
        call.start()
        at.network.last.answer(503)
        assert sandbox.got.count(b"100 Continue") == 1
        call.body([ASK], True)
        assert at.network.last.got.endswith(ASK)


async def test_a_server_that_takes_no_more_holds_the_sandbox_from_the_first_write_on() -> None:
    async with world(p=policy("a")) as at:
        at.network.small = True
        call, sandbox = at.call(f"content-length: {2**20}")
        call.body([b"x" * 2**18], False)
        call.start()
        assert sandbox.held


async def test_a_word_in_between_does_not_follow_the_end() -> None:
    async with world(p=policy("a", retries=0)) as at:
        _, sandbox = at.ask(ASK)
        at.network.last.interim()
        at.network.last.lose()
        assert failed(sandbox) is Code.UPSTREAM_FAILED


@pytest.mark.parametrize("chunked", [True, False])
async def test_an_answer_that_comes_before_the_body_is_whole(chunked: bool) -> None:
    async with world(p=policy("a")) as at:
        call, sandbox = at.call("transfer-encoding: chunked" if chunked else "content-length: 100")
        call.body([b"x" * 10], False)
        call.start()
        at.network.last.answer(413, b"too much")
        call.body([b"x" * 90], True)
        assert sandbox.ends == ["finish"]
        assert at.idle()
        assert len(at.log.records) == 1


async def test_a_body_in_chunks_is_sent_again_whole() -> None:
    async with world(p=policy("a", "b")) as at:
        call, _ = at.call("transfer-encoding: chunked")
        call.body([b"abc"], False)
        call.start()
        at.network.last.answer(503)
        call.body([b"de"], True)
        assert at.network.last.got.endswith(b"\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n")


# Who is to blame


async def test_a_server_that_never_answers_has_failed() -> None:
    async with world(p=policy("a", max_fails=1)) as at:
        call, sandbox = at.ask(ASK)
        call.time_out()
        assert failed(sandbox) is Code.UPSTREAM_TIMEOUT
        _, sandbox = at.ask(ASK)
        assert failed(sandbox) is Code.UPSTREAM_BUSY


async def test_a_sandbox_that_stops_in_the_middle_says_nothing_of_the_server() -> None:
    async with world(p=policy("a", max_fails=1)) as at:
        for number in range(3):
            call, sandbox = at.call("content-length: 10")
            call.body([b"x"], False)
            call.start()
            if number == 1:
                at.network.last.head(200)
                call.spoil(CortexError(Code.BAD_REQUEST, "Bad", hint="none"))
            elif number == 2:
                at.network.last.head(200)
                sandbox.congested = True
                call.time_out()
            else:
                call.time_out()
            assert len(sandbox.ends) == 1
        _, sandbox = at.ask(ASK)
        assert not sandbox.ends
        at.network.last.answer()


async def test_after_a_connection_that_was_closed_for_being_idle_a_new_one_is_opened() -> None:
    async with world(p=policy("a", retries=0)) as at:
        at.network.at_once = False
        origin = at.context.plans._named["p"].spots[0].origin
        at.network.idle = [Server(origin, fresh=False), Server(origin, fresh=False)]
        _, sandbox = at.ask(ASK)
        at.network.last.lose()
        await turn()
        at.network.dialled()
        await turn()
        at.network.last.answer()
        assert sandbox.ends == ["finish"]


# Together


async def test_a_call_that_was_to_share_and_had_to_ask_itself_is_accounted_as_asked() -> None:
    async with world(p=policy("a", keys=("sk",), coalesce=True)) as at:
        at.ask(ASK, user="ann")
        _, bob = at.ask(ASK, user="bob")
        await turn()
        at.network.last.answer(400)
        at.network.last.answer(200, b'{"model": "m", "usage": {"prompt_tokens": 3, "completion_tokens": 2}}')
        assert bob.ends == ["finish"]
        assert [(record.user, record.cached) for record in at.log.records] == [("ann", ""), ("bob", "")]
        assert at.log.records[1].input == 3


async def test_followers_find_the_place_of_a_leader_that_failed_free() -> None:
    limits = Limits(provider=Limit(concurrency=1), waiting=0)
    async with world(p=policy("a", keys=("sk",), coalesce=True, retries=0, limits=limits)) as at:
        at.ask(ASK, user="ann")
        _, bob = at.ask(ASK, user="bob")
        await turn()
        at.network.last.lose()
        at.network.last.answer()
        assert bob.ends == ["finish"]
        assert at.idle()


async def test_a_leader_whose_followers_ask_for_themselves_and_whose_sandbox_is_gone_is_over() -> None:
    async with world(p=policy("a", keys=("sk",), coalesce=True)) as at:
        ann, _ = at.ask(ASK, user="ann")
        _, bob = at.ask(ASK, user="bob")
        await turn()
        ann.abort()
        leader = at.network.last
        assert leader.open, "bob waits for it"
        leader.head(400)
        assert not leader.open
        at.network.last.answer()
        assert bob.ends == ["finish"]
        assert at.idle()


# Everything is let go of


@pytest.mark.parametrize("how", ["abort", "time_out"])
@pytest.mark.parametrize("when", ["gathering", "waiting", "dialling", "sent", "answering", "again", "following"])
async def test_nothing_is_kept_of_a_call_that_is_over(when: str, how: str) -> None:
    limits = Limits(provider=Limit(concurrency=1))
    rules = {"coalesce": when in ("gathering", "following"), "limits": limits if when == "waiting" else Limits()}
    async with world(p=policy("a", "b", **rules)) as at:
        if when in ("waiting", "following"):
            other, _ = at.ask(ASK, user="other")
        at.network.at_once = when != "dialling"
        if when == "gathering":
            call, _ = at.call("content-length: 10")
            call.start()
        else:
            call, _ = at.ask(ASK)
        await turn()
        if when == "answering":
            at.network.last.head(200)
        if when == "again":
            at.network.at_once = False
            at.network.last.answer(503)
            await turn()
        getattr(call, how)()
        await turn()
        if when in ("waiting", "following"):
            other.abort()
        await turn()
        assert at.idle()
        assert not any(server.open for server in at.network.servers)
        assert not [future for _, future in at.network.dials if not future.done()]
        assert len(at.log.records) == 1 + (when in ("waiting", "following"))


async def test_a_second_key_is_not_tried_for_ever() -> None:
    async with world(p=policy("a", keys=("k1", "k2", "k3"), retries=5, retry_within_s=0.001)) as at:
        began = at.context.clock()
        at.context.clock = lambda: began
        _, sandbox = at.ask(ASK)
        at.context.clock = lambda: began + 1
        at.network.last.answer(429)
        assert sandbox.ends == ["finish"]
        assert len(at.network.servers) == 1


async def test_a_policy_may_be_replaced_while_its_calls_run() -> None:
    async with world(p=policy("a", limits=Limits(provider=Limit(concurrency=1)))) as at:
        old = at.context.plans._named["p"]
        _, first = at.ask(ASK)
        _, second = at.ask(ASK)
        at.use(p=policy("b"))
        at.network.servers[0].answer()
        await turn()
        at.network.servers[1].answer()
        assert first.ends == second.ends == ["finish"]
        assert (old.admission.running, old.admission.waiting) == (0, 0)
