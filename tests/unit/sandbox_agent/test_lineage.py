from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sandbox_agent.lineage import Lineage


def test_a_change_is_news_until_it_is_sent() -> None:
    lineage = Lineage()
    lineage.bound("1", "1")
    assert not lineage.news("1")
    assert not lineage.news("")
    assert lineage.news("2")
    lineage.sent("2")
    assert not lineage.news("2")
    assert lineage.news("1"), "back to what was bound is a change too"


def test_what_was_sent_is_news_again_after_the_broker_was_away_unless_it_has_come_back() -> None:
    lineage = Lineage()
    lineage.bound("1", "1")
    lineage.sent("2")
    lineage.forget_sent()
    assert lineage.news("2")
    lineage.sent("2")
    lineage.bound("2", "2")
    lineage.forget_sent()
    assert not lineage.news("2")


def test_an_answer_to_an_older_state_does_not_outrank_a_newer_one() -> None:
    lineage = Lineage()
    lineage.bound("1", "1")
    for version in ("2", "3"):
        lineage.sent(version)
    assert lineage.outdates("2", "3")
    assert lineage.outdates("1", "3")
    assert lineage.outdates("1", "4"), "not sent yet"
    assert not lineage.outdates("9", "3"), "the user's own new one"
    assert not lineage.outdates("1", ""), "the file is gone"


def test_what_was_bound_again_is_no_longer_older() -> None:
    lineage = Lineage()
    lineage.bound("1", "1")
    lineage.sent("2")
    lineage.bound("2", "2")
    assert not lineage.outdates("1", "2"), "the user has put the first one back"


class World:
    """A file, a broker that answers late, and both as ``CredentialFiles`` and the vault would have them."""

    def __init__(self) -> None:
        self.lineage = Lineage()
        self.file = self.vault = "0"
        self.lineage.bound("0", "0")
        self.to_broker: list[str] = []
        self.to_sandbox: list[str] = []
        self.sealed = 0

    def agent_writes(self, content: str) -> None:
        self.file = content
        if self.lineage.news(content):
            self.lineage.sent(content)
            self.to_broker.append(content)

    def broker_hears(self) -> None:
        if self.to_broker:
            self.vault = self.to_broker.pop(0)
            self.sealed += 1
            self.to_sandbox.append(self.vault)

    def sandbox_hears(self) -> None:
        if self.to_sandbox:
            offered = self.to_sandbox.pop(0)
            if offered != self.file and not self.lineage.outdates(offered, self.file):
                self.file = offered
            self.lineage.bound(offered, self.file)
            self.agent_writes(self.file)  # a look, as every bind ends with

    def settle(self) -> None:
        for _ in range(200):
            self.broker_hears()
            self.sandbox_hears()


@given(st.lists(st.sampled_from(["write", "broker", "sandbox"]), max_size=40))
def test_whatever_the_order_the_last_word_of_the_agent_is_kept_and_told_once(steps: list[str]) -> None:
    world, written = World(), 0
    for step in steps:
        if step == "write":
            written += 1
            world.agent_writes(str(written))
        elif step == "broker":
            world.broker_hears()
        else:
            world.sandbox_hears()
    world.settle()
    assert (world.to_broker, world.to_sandbox) == ([], [])
    assert world.file == world.vault == str(written)
    assert world.sealed == written
