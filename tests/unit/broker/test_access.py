"""Tokens, tickets, origins, hosts."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.access import (
    MAX_TICKETS,
    Access,
    check_host,
    check_user_id,
    format_token,
    parse_token,
    verify_hook,
)
from broker.config import USER_ID, Config, FrontConfig
from broker.errors import Code, CortexError
from broker.store.db import Database
from broker.store.tokens import TokenStore

names = st.from_regex(USER_ID, fullmatch=True)
NOW = 1_800_000_000.0


class World:
    def __init__(self, db: Database) -> None:
        self.db = db
        self.now = NOW
        self.config = Config(front=FrontConfig(allowed_origins=("https://app.example",)))
        self.access = Access(TokenStore(db), lambda: self.config, bytes(32), lambda: self.now, admin_token="a" * 32)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    db = await Database.open(tmp_path / "state")
    yield World(db)
    await db.close()


def code_of(caught: pytest.ExceptionInfo[CortexError]) -> Code:
    return caught.value.code


@given(names, names, st.binary(min_size=32, max_size=32))
def test_a_token_names_its_user(user: str, workspace: str, secret: bytes) -> None:
    token = format_token(user, workspace, secret)
    assert parse_token(token) == (user, workspace)
    assert len(token) < 512
    assert token.isascii()
    assert not set(token) & set(' ,;="/\\')  # fits a subprotocol and a query


@given(st.text() | st.text().map(lambda text: f"cx1.{text}") | st.binary().map(lambda b: f"cx1.{b.hex()}.{'a' * 43}"))
def test_any_other_text_is_refused(text: str) -> None:
    with pytest.raises(CortexError) as caught:
        parse_token(text)
    assert code_of(caught) is Code.TOKEN_INVALID


@pytest.mark.parametrize("text", ["", ".", "..", ".a", "a/b", "a b", "a\n", "ä", "a" * 129, "-a"])
def test_user_ids_that_are_refused(text: str) -> None:
    with pytest.raises(CortexError) as caught:
        check_user_id(text)
    assert code_of(caught) is Code.BAD_USER_ID


async def test_a_token_is_good_until_it_expires(world: World) -> None:
    minted = await world.access.mint("alice", "main")
    assert minted.expires_at == NOW + 900
    world.now += 899
    assert (await world.access.verify(minted.token)).expires_at == minted.expires_at
    world.now += 1
    with pytest.raises(CortexError) as caught:
        await world.access.verify(minted.token)
    assert code_of(caught) is Code.TOKEN_EXPIRED


async def test_a_token_of_another_user_or_cut_short_is_nobodys(world: World) -> None:
    minted = await world.access.mint("alice", "main")
    secret = minted.token.rpartition(".")[2]
    name = base64.urlsafe_b64encode(b"bob/main").rstrip(b"=").decode()
    for text in (f"cx1.{name}.{secret}", minted.token[:-1], minted.token + "A", minted.token.swapcase()):
        with pytest.raises(CortexError) as caught:
            await world.access.verify(text)
        assert code_of(caught) is Code.TOKEN_INVALID
    with pytest.raises(CortexError) as caught:
        await world.access.verify("")
    assert code_of(caught) is Code.TOKEN_MISSING


async def test_revoking_takes_tokens_and_tickets_of_that_session_alone(world: World) -> None:
    mine = await world.access.mint("alice", "main")
    ticket = world.access.issue_ticket("alice", "main")
    other = await world.access.mint("alice", "side")
    other_ticket = world.access.issue_ticket("bob", "main")
    assert await world.access.revoke("alice", "main") == 2
    with pytest.raises(CortexError) as caught:
        await world.access.verify(mine.token)
    assert code_of(caught) is Code.TOKEN_REVOKED
    with pytest.raises(CortexError):
        await world.access.redeem(ticket.token)
    assert (await world.access.verify(other.token)).workspace == "side"
    assert (await world.access.redeem(other_ticket.token)).user == "bob"


async def test_the_store_holds_no_token(world: World) -> None:
    minted = await world.access.mint("alice", "main")
    secret = minted.token.rpartition(".")[2]
    rows = await world.db.read("SELECT * FROM tokens")
    assert len(rows) == 1
    assert secret not in repr(rows)
    assert base64.urlsafe_b64decode(secret + "=") not in rows[0]


async def test_a_ticket_works_once_and_not_for_long(world: World) -> None:
    ticket = world.access.issue_ticket("alice", "main")
    assert (await world.access.redeem(ticket.token)).user == "alice"
    with pytest.raises(CortexError) as caught:
        await world.access.redeem(ticket.token)
    assert code_of(caught) is Code.TOKEN_INVALID
    late = world.access.issue_ticket("alice", "main")
    world.now += 30
    with pytest.raises(CortexError) as caught:
        await world.access.redeem(late.token)
    assert code_of(caught) is Code.TOKEN_EXPIRED
    with pytest.raises(CortexError):
        await world.access.verify(late.token)


async def test_a_token_is_no_ticket(world: World) -> None:
    minted = await world.access.mint("alice", "main")
    with pytest.raises(CortexError):
        await world.access.redeem(minted.token)


async def test_open_tickets_are_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_TICKETS == 10_000
    monkeypatch.setattr("broker.access.MAX_TICKETS", 3)
    for _ in range(3):
        world.access.issue_ticket("a", "main")
    with pytest.raises(CortexError) as caught:
        world.access.issue_ticket("a", "main")
    assert caught.value.code.retryable
    world.now += 31
    world.access.issue_ticket("a", "main")


async def test_expired_tokens_are_pruned_in_passing(world: World) -> None:
    await world.access.mint("alice", "main", 1.0)
    world.now += 3600
    await world.access.mint("alice", "main")
    assert len(await world.db.read("SELECT hash FROM tokens")) == 1


def test_origins_are_compared_exactly(world: World) -> None:
    world.access.check_origin(None)
    world.access.check_origin("https://app.example")
    for origin in ("https://app.example.evil", "https://app.example:444", "http://app.example", "null", ""):
        with pytest.raises(CortexError) as caught:
            world.access.check_origin(origin)
        assert code_of(caught) is Code.ORIGIN_FORBIDDEN


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1:8765", "[::1]", "[::1]:8765"])
def test_hosts_that_may_be_named(host: str) -> None:
    check_host(host, ("127.0.0.1", "localhost", "[::1]"), "front.allowed_hosts")


@pytest.mark.parametrize(
    "host",
    [
        None,
        "",
        "localhost.evil",
        "evil:localhost",
        "x@localhost",
        "::1",
        "localhost/",
        "localhost:80:90",
        ":80",
        "[::1",
        "localhost\n",
        "localhost:",
    ],
)
def test_hosts_that_may_not(host: str | None) -> None:
    with pytest.raises(CortexError) as caught:
        check_host(host, ("127.0.0.1", "localhost", "[::1]"), "front.allowed_hosts")
    assert code_of(caught) is Code.HOST_FORBIDDEN


@given(st.text().filter(lambda text: text.lower().partition(":")[0] != "localhost"))
def test_any_other_host_is_refused(host: str) -> None:
    with pytest.raises(CortexError) as caught:
        check_host(host, ("localhost",), "key")
    assert code_of(caught) is Code.HOST_FORBIDDEN


def test_no_admin_token_admits_nobody(world: World) -> None:
    world.access.check_admin("Bearer " + "a" * 32)
    world.access.check_admin("bearer " + "a" * 32)
    empty = Access(TokenStore(world.db), lambda: world.config, bytes(32))
    for access, header in ((empty, "Bearer "), (empty, "Bearer"), (world.access, None), (world.access, "Bearer ä")):
        with pytest.raises(CortexError) as caught:
            access.check_admin(header)
        assert code_of(caught) is Code.ADMIN_REQUIRED


def test_the_published_example_of_standard_webhooks_verifies() -> None:
    """The test vector of the Standard Webhooks libraries."""
    headers = {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }
    key = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    call = verify_hook([key], headers, b'{"test": 2432232314}', 1614265330.0)
    assert call.id == headers["webhook-id"]
    with pytest.raises(CortexError):
        verify_hook([key], headers, b'{"test": 2432232315}', 1614265330.0)
    with pytest.raises(CortexError):
        verify_hook([], headers, b'{"test": 2432232314}', 1614265330.0)


@given(st.dictionaries(st.sampled_from(["webhook-id", "webhook-timestamp", "webhook-signature"]), st.text()))
def test_any_headers_are_answered(headers: dict[str, str]) -> None:
    with pytest.raises(CortexError):
        verify_hook([b"k" * 32], headers, b"", NOW)
