"""Answers that need not be asked for: who gets one from before, who from another call, and who has to ask."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from broker.gateway.cache import Recorded
from broker.gateway.caller import Endpoint
from broker.gateway.context import Context
from broker.gateway.fetch import Fetched
from broker.gateway.heads import RequestHead, ResponseHead, parse_request
from broker.gateway.lookup import Lookup
from broker.gateway.messages import Provider, Scheme
from broker.gateway.plan import Plan
from broker.gateway.policy import CacheRule, CacheStore, Policy
from broker.gateway.routes import Route, compile_routes
from broker.host.tasks import TaskOwner

TARGET = b"/v1/chat/completions"
ASK = b'{"model": "m", "temperature": 0, "messages": []}'
OK = ResponseHead(200, b"OK", [(b"content-type", b"application/json")], 2, False, True, None, frozenset())


class Audience:
    """A call. ``heard``: head, pieces, end or loss; ``asked``: it had to ask."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.asked = 0

    def shared_head(self, recorded: Recorded) -> None:
        self.heard.append(f"head {recorded.status}")

    def shared_body(self, pieces: list[bytes]) -> None:
        self.heard.append(b"".join(pieces).decode())

    def shared_end(self) -> None:
        self.heard.append("end")

    def shared_lost(self, why: str) -> None:
        self.heard.append("lost")

    def ask(self) -> None:
        self.asked += 1


@pytest.fixture
async def context() -> AsyncIterator[Context]:
    tasks = TaskOwner("test")
    made = Context(tasks)
    made.treat(
        {
            "kept": Policy(kind="openai", upstreams=("http://h:1",), cache=CacheRule(enabled=True)),
            "shared": Policy(kind="openai", upstreams=("http://h:1",), coalesce=True),
            "both": Policy(kind="openai", upstreams=("http://h:1",), coalesce=True, cache=CacheRule(enabled=True)),
            "batch": Policy(kind="openai", upstreams=("http://h:1",), batch_s=0.001),
            "plain": Policy(kind="openai", upstreams=("http://h:1",)),
        },
        CacheStore(),
    )
    yield made
    await made.close()
    await tasks.close()


def head(*lines: bytes) -> RequestHead:
    return parse_request(b"POST %s HTTP/1.1\r\nHost: h\r\n%s\r\n" % (TARGET, b"".join(lines)))


async def unsent(body: bytes) -> Fetched:
    raise AssertionError("nothing is sent together here")


def plan(context: Context, name: str) -> Plan:
    found = context.plans.named(name)
    assert found is not None
    return found


def route(scheme: Scheme = "key") -> Route:
    return compile_routes({"p": Provider("openai", "http://h:1", scheme=scheme)})[b"p"]


def look(
    context: Context, name: str, *, scope: str = "operator", body: bytes = ASK, asked: RequestHead | None = None,
    scheme: Scheme = "key",
) -> tuple[Lookup, Audience]:  # fmt: skip
    lookup, audience = Lookup(context, plan(context, name), route(scheme), scope, Endpoint.GENERATE), Audience()
    lookup.find(asked or head(), TARGET, body, audience, audience.ask, unsent)
    return lookup, audience


def answer(lookup: Lookup) -> None:
    lookup.head(OK)
    lookup.body([b"{}"])
    lookup.end()
    lookup.drop()


async def test_what_is_neither_kept_nor_shared_is_asked(context: Context) -> None:
    for _ in range(2):
        lookup, audience = look(context, "plain")
        assert (audience.asked, audience.heard, lookup.cached) == (1, [], "")
        answer(lookup)


async def test_a_whole_answer_is_given_again_to_who_has_the_same_credential(context: Context) -> None:
    first, audience = look(context, "kept")
    assert audience.asked == 1
    answer(first)
    again, audience = look(context, "kept")
    assert (audience.asked, audience.heard, again.cached) == (0, ["head 200", "{}", "end"], "hit")
    assert look(context, "kept", scope="another")[1].asked == 1
    assert look(context, "kept", body=ASK.replace(b"0", b"1"))[1].asked == 1, "what is random is asked"
    assert look(context, "kept", asked=head(b"Cache-Control: no-cache\r\n"))[1].asked == 1


@pytest.mark.parametrize("header", [b"OpenAI-Project: mine\r\n", b"Accept-Encoding: br\r\n"])
async def test_what_a_provider_does_not_get_to_see_makes_no_other_question(context: Context, header: bytes) -> None:
    first, _ = look(context, "kept")
    answer(first)
    assert look(context, "kept", asked=head(header))[0].cached == "hit"


async def test_answers_are_kept_by_account_where_the_sandbox_says_who_pays(context: Context) -> None:
    first, _ = look(context, "kept", asked=head(b"OpenAI-Project: one\r\n"), scheme="passthrough")
    answer(first)
    for project, hit in ((b"one", "hit"), (b"two", "")):
        again, _ = look(context, "kept", asked=head(b"openai-project: %s\r\n" % project), scheme="passthrough")
        assert again.cached == hit


@pytest.mark.parametrize("how", ["dropped", "elsewhere"])
async def test_half_an_answer_and_one_of_another_provider_are_not_kept(context: Context, how: str) -> None:
    lookup, _ = look(context, "kept")
    lookup.head(OK)
    if how == "elsewhere":
        lookup.elsewhere(shared=True)
        lookup.head(OK)
        lookup.body([b"{}"])
        lookup.end()
    lookup.drop()
    assert look(context, "kept")[1].asked == 1


async def test_equal_calls_get_what_the_first_gets(context: Context) -> None:
    leader, _ = look(context, "shared")
    followers = [look(context, "shared") for _ in range(2)]
    other, stranger = look(context, "shared", scope="another")
    assert leader.followers == 2
    assert [audience.asked for _, audience in followers] == [0, 0]
    assert stranger.asked == 1
    answer(leader)
    await asyncio.sleep(0)
    for lookup, audience in followers:
        assert audience.heard[0] == "head 200"
        assert "".join(audience.heard[1:]) == "{}end"
        assert lookup.cached == "coalesced"
    other.drop()


async def test_followers_of_a_call_that_fails_are_told_and_the_next_leads(context: Context) -> None:
    leader, _ = look(context, "shared")
    follower, audience = look(context, "shared")
    leader.drop()
    assert audience.heard == ["lost"]
    follower.lost()
    assert follower.cached == ""
    assert look(context, "shared")[1].asked == 1


async def test_a_stand_in_that_another_credential_pays_is_shared_with_nobody(context: Context) -> None:
    leader, _ = look(context, "shared")
    _, audience = look(context, "shared")
    leader.elsewhere(shared=False)
    assert audience.heard == ["lost"]
    assert leader.followers == 0
    answer(leader)


async def test_a_leader_whose_sandbox_is_gone_hears_when_nobody_waits_any_more(context: Context) -> None:
    leader, _ = look(context, "shared")
    follower, _ = look(context, "shared")
    deserted: list[bool] = []
    leader.alone(lambda: deserted.append(True))
    assert not deserted
    follower.drop()
    assert deserted == [True]


async def test_a_follower_that_does_not_read_is_held(context: Context) -> None:
    leader, _ = look(context, "shared")
    follower, audience = look(context, "shared")
    follower.hold(True)
    answer(leader)
    await asyncio.sleep(0)
    assert "{}" not in audience.heard
    follower.hold(False)
    assert audience.heard[-2:] == ["{}", "end"]


async def test_what_was_shared_is_kept_too(context: Context) -> None:
    leader, _ = look(context, "both")
    look(context, "both")
    answer(leader)
    assert look(context, "both")[0].cached == "hit"


async def test_embeddings_go_together_unless_the_budget_is_spent(context: Context) -> None:
    sent: list[bytes] = []

    async def send(body: bytes) -> Fetched:
        sent.append(body)
        return Fetched(401, [], b"no")

    body = b'{"model": "e", "input": "a"}'
    lookups = [
        Lookup(context, plan(context, "batch"), route(), "operator", Endpoint.EMBED, may_spend=may)
        for may in (True, False)
    ]
    audiences = [Audience(), Audience()]
    for lookup, audience in zip(lookups, audiences, strict=True):
        lookup.find(head(), b"/v1/embeddings", body, audience, audience.ask, send)
    assert [lookup.cached for lookup in lookups] == ["batched", ""]
    assert [audience.asked for audience in audiences] == [0, 1]
    async with asyncio.timeout(5):
        while "end" not in audiences[0].heard:
            await asyncio.sleep(0.001)
    assert audiences[0].heard == ["head 401", "no", "end"]
    assert len(sent) == 1


async def test_embeddings_that_are_wanted_fresh_and_what_are_none_go_alone(context: Context) -> None:
    fresh = head(b"Cache-Control: no-cache\r\n")
    for endpoint, asked in ((Endpoint.EMBED, fresh), (Endpoint.GENERATE, head())):
        lookup, audience = Lookup(context, plan(context, "batch"), route(), "operator", endpoint), Audience()
        lookup.find(asked, b"/v1/embeddings", b'{"model": "e", "input": "a"}', audience, audience.ask, unsent)
        assert (audience.asked, lookup.cached) == (1, "")


async def test_a_stand_in_that_the_same_credential_pays_is_shared(context: Context) -> None:
    leader, _ = look(context, "shared")
    _, audience = look(context, "shared")
    leader.elsewhere(shared=True)
    answer(leader)
    await asyncio.sleep(0)
    assert (audience.heard[0], audience.heard[-1]) == ("head 200", "end")


@pytest.mark.parametrize("gone", [False, True])
async def test_answers_that_are_kept_elsewhere_are_waited_for_unless_the_call_is_over(
    context: Context, gone: bool
) -> None:
    context.responses.asynchronous = True
    lookup, audience = look(context, "kept")
    assert (audience.asked, audience.heard) == (0, []), "it is being looked for"
    if gone:
        lookup.drop()
    async with asyncio.timeout(5):
        while len(context.tasks):
            await asyncio.sleep(0)
    assert audience.asked == (not gone)
