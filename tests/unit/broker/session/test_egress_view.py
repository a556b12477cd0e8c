"""What people see of the way out."""

from __future__ import annotations

import json
import shlex
from typing import Any

from broker.metrics import EGRESS_BYTES, EGRESS_DECISIONS
from broker.session.ecosystems import HOSTS
from broker.session.egress_view import MAX_HOSTS, MAX_USERS, MAX_WARNINGS, EgressView, Seen, allow_line, denial

RESULTS = ("allowed", "denied", "refused_address", "limited")


def row(host: str, port: int = 443, tool: str = "", **counts: Any) -> dict[str, Any]:
    last = next((result for result in RESULTS if counts.get(result)), "")
    empty = dict.fromkeys((*RESULTS, "sent", "received"), 0)
    return {"host": host, "port": port, "tool": tool, "last": last} | empty | counts


def report(*rows: dict[str, Any], user: str = "ann", workspace: str = "main") -> dict[str, Any]:
    return {"kind": "egress", "slot": "s", "user": user, "workspace": workspace, "hosts": list(rows)}


def added(line: str) -> dict[str, Any]:
    """The section that a line stores; it is what a shell would do."""
    words = shlex.split(line)
    assert words[0] == "echo"
    assert words[2:] == ["|", "cortex", "user", "config", "set", "ann", "egress"]
    section: dict[str, Any] = json.loads(words[1])
    return section


def test_counts_add_up_and_the_last_used_comes_first() -> None:
    now = [100.0]
    view = EgressView(lambda: now[0])
    view.heard(report(row("a.example", tool="pip", denied=2), row("b.example", allowed=1, sent=5, received=7)))
    now[0] = 200.0
    view.heard(report(row("a.example", allowed=1, sent=1)))
    first, second = view.of_user("ann")
    assert first == Seen("main", "a.example", 443, "pip", "allowed", 1, 2, 0, 0, 1, 0, 200.0)
    assert second.view() == {
        "workspace": "main", "host": "b.example", "port": 443, "tool": "", "last": "allowed", "last_at": 100.0,
        "allowed": 1, "denied": 0, "refused_address": 0, "limited": 0, "sent": 5, "received": 7,
    }  # fmt: skip
    view.heard(report(row("b.example", received=1)))
    assert view.of_user("ann")[0].last == "allowed", "bytes alone decide nothing"
    view.heard(report(row("b.example", allowed=1, denied=1, last="denied")))
    assert view.of_user("ann")[0].last == "denied"


def test_every_decision_and_byte_is_in_the_metrics() -> None:
    def values() -> list[float]:
        counters = [EGRESS_DECISIONS.labels(result) for result in RESULTS]
        counters += [EGRESS_BYTES.labels("sent"), EGRESS_BYTES.labels("received")]
        return [counter._value.get() for counter in counters]

    before = values()
    counts: dict[str, Any] = dict(zip((*RESULTS, "sent", "received"), (1, 2, 3, 4, 5, 6), strict=True))
    view = EgressView()
    view.heard(report(row("a.example", **counts)))
    view.heard(report(row("", 0, denied=10), user=""))
    assert [new - old for new, old in zip(values(), before, strict=True)] == [1, 12, 3, 4, 5, 6]
    assert view.of_user("") == [], "package builders are nobody's"


def test_what_is_kept_is_bounded() -> None:
    view = EgressView()
    view.heard(report(*(row(f"h{number}.example", denied=1) for number in range(MAX_HOSTS)), row("", 0, denied=9)))
    view.heard(report(row("h0.example", denied=1)))
    view.heard(report(row("new.example", denied=1)))
    hosts = [seen.host for seen in view.of_user("ann")]
    assert len(hosts) == MAX_HOSTS
    assert hosts[:2] == ["new.example", "h0.example"]
    assert "h1.example" not in hosts
    for number in range(MAX_USERS):
        view.heard(report(row("a.example", denied=1), user=f"u{number}"))
    assert view.of_user("ann") == []
    assert view.of_user("u0")


def test_a_warning_says_who_wanted_what_and_how_to_allow_it() -> None:
    view = EgressView()
    view.heard(report(row("a.example", 8443, tool="git", denied=1)))
    (said,) = view.warnings("ann", "main", (), {"hosts": ["b.example"], "ecosystems": ["go"]})
    who, _, line = said.partition("; allow it with: ")
    assert who == "git wanted a.example:8443: denied"
    assert added(line) == {"hosts": ["b.example", "a.example:8443"], "ecosystems": ["go"]}
    assert view.warnings("ann", "other", (), {}) == ()
    assert view.warnings("bob", "main", (), {}) == ()
    assert view.warnings("ann", "main", ("a.example:8443",), {}) == (), "it is allowed by now"
    view.heard(report(row("a.example", 8443, allowed=1)))
    assert view.warnings("ann", "main", (), {}) == ()
    view.heard(report(*(row(f"h{number}.example", denied=1) for number in range(9))))
    assert len(view.warnings("ann", "main", (), {})) == MAX_WARNINGS
    view.forget("ann")
    assert view.warnings("ann", "main", (), {}) == ()


def test_hosts_of_an_ecosystem_are_allowed_with_it() -> None:
    line = allow_line("ann", {"hosts": ["b.example"]}, HOSTS["python"][1], 443)
    assert added(line) == {"hosts": ["b.example"], "ecosystems": ["python"]}
    assert added(allow_line("ann", {"ecosystems": ["go"]}, HOSTS["python"][1], 443)) == {"ecosystems": ["go", "python"]}


def test_a_tool_that_does_not_say_its_name_is_guessed_by_the_host() -> None:
    host = HOSTS["python"][1]
    assert denial("ann", Seen("main", host, 443), {}).startswith(f"pip or the like wanted {host}: denied")
    assert denial("ann", Seen("main", host, 443, "uv"), {}).startswith(f"uv wanted {host}: denied")
    assert denial("ann", Seen("main", "a.example", 80), {}).startswith("something wanted a.example:80: denied")


def test_no_line_breaks_out_of_its_quotes() -> None:
    words = shlex.split(allow_line("a|b'c", {"hosts": ["it's"]}, "a.example", 443))
    assert words[-2] == "a|b'c"
    assert json.loads(words[1]) == {"hosts": ["it's", "a.example"]}


def test_an_address_of_ipv6_cannot_be_allowed() -> None:
    assert "cannot be allowed" in denial("ann", Seen("main", "2001:db8::1", 443), {})
    assert "[2001:db8::1]" in denial("ann", Seen("main", "2001:db8::1", 443), {})
