from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from sandbox_agent.bind import MAX_FILES, Binder, Claim
from sandbox_agent.port import AgentChannel
from sandbox_agent.spawn import SpawnError
from sandbox_agent.wire.messages import AgentSpec, Attach, Bind


class Recorder:
    """Hub and runner in one: writes down what a bind asks for."""

    agent_info = ""
    open_turns = 0
    clients = 0
    turns = 0
    ahead = ""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.refuse: SpawnError | None = None

    def agent_up(self, channel: AgentChannel, spec: AgentSpec) -> None: ...
    def agent_lines(self, lines: list[bytes]) -> None: ...
    def agent_down(self, what: str, *, final: bool) -> None: ...
    def serve(self, sock: socket.socket, attach: Attach) -> None: ...
    async def close(self) -> None: ...

    def set_mcp(self, servers: list[dict[str, Any]]) -> str:
        self.calls.append(("mcp", servers))
        return "next_session"

    def set_settings(self, settings: dict[str, Any]) -> str:
        self.calls.append(("settings", settings))
        return "now"

    def claim(self, *, moved: bool, keep_ahead: bool) -> None:
        self.calls.append(("claim", (moved, keep_ahead)))

    def restart(self) -> None:
        self.calls.append(("restart", None))

    def want(self, spec: AgentSpec) -> str:
        if self.refuse is not None:
            raise self.refuse
        self.calls.append(("process", spec))
        return "next_turn"


SPEC = AgentSpec(name="a", protocol="acp", command=["x"])


def make(home: Path, session: str = "") -> tuple[Binder, Recorder]:
    recorder = Recorder()

    def claimed(claim: Claim) -> None:
        recorder.claim(moved=claim.moved, keep_ahead=claim.keep_ahead)

    return Binder(home=str(home), hub=recorder, process=recorder, session=session, on_claim=claimed), recorder


def test_parts_are_applied_files_first_process_last_and_told_with_their_effect(tmp_path: Path) -> None:
    binder, seen = make(tmp_path)
    parts = {
        "process": SPEC.encode(),
        "mcp": [{"name": "m"}],
        "settings": {"allow_client_mcp": True},
        "files": [{"path": ".a/token", "mode": 0o644, "content": b"t"}],
    }
    hashes = {name: f"h-{name}" for name in parts}
    bound = binder.apply(Bind(7, 1, parts, hashes))
    assert (bound.id, bound.ok, bound.applied) == (7, True, hashes)
    assert bound.effect == {"files": "now", "settings": "now", "mcp": "next_session", "process": "next_turn"}
    assert [name for name, _ in seen.calls] == ["settings", "mcp", "process"]
    assert seen.calls[-1][1] == SPEC
    token = tmp_path / ".a/token"
    assert token.read_bytes() == b"t"
    assert token.stat().st_mode & 0o777 == 0o600


def test_an_equal_hash_does_nothing(tmp_path: Path) -> None:
    binder, seen = make(tmp_path)
    parts: dict[str, Any] = {"mcp": [{"name": "m"}], "files": [{"path": "f", "content": b"1"}]}
    hashes = {"mcp": "1", "files": "2"}
    binder.apply(Bind(1, 1, parts, hashes))
    (tmp_path / "f").write_text("changed by the user")
    bound = binder.apply(Bind(2, 2, parts, hashes))
    assert bound.ok
    assert bound.effect == {"mcp": "now", "files": "now"}
    assert len(seen.calls) == 1
    assert (tmp_path / "f").read_text() == "changed by the user"


def test_a_file_that_is_no_longer_wanted_goes_but_never_one_of_the_user(tmp_path: Path) -> None:
    binder, _ = make(tmp_path)
    (tmp_path / "mine").write_text("user's")
    binder.apply(
        Bind(1, 1, {"files": [{"path": "a", "content": b"1"}, {"path": "b", "content": b"1"}]}, {"files": "1"})
    )
    binder.apply(Bind(2, 2, {"files": [{"path": "b", "content": b"2"}]}, {"files": "2"}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "mine"]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"unheard-of": 1}, "request.invalid"),
    ({"mcp": {"a": 1}}, "request.invalid"),
    ({"mcp": ["x"]}, "request.invalid"),
    ({"settings": []}, "request.invalid"),
    ({"process": "x"}, "request.invalid"),
    ({"claim": "s1"}, "request.invalid"),
    ({"claim": {"moved": True}}, "request.invalid"),
    ({"claim": {"session": ""}}, "request.invalid"),
    ({"claim": {"session": "s1", "restart": 1}}, "request.invalid"),
    ({"process": {"t": "agent", "name": "a", "protocol": "acp", "command": []}}, "request.invalid"),
    ({"files": [{"path": "x"}]}, "request.invalid"),
    ({"files": [{"path": "x", "content": b"1" * (2**20 + 1)}]}, "request.invalid"),
    ({"files": [{"path": "../x", "content": b""}]}, "config.invalid_section"),
    ({"files": [{"path": "/etc/x", "content": b""}]}, "config.invalid_section"),
]


@pytest.mark.parametrize(("bad", "code"), BAD)
def test_a_bad_part_is_refused_before_any_is_applied(tmp_path: Path, bad: dict[str, Any], code: str) -> None:
    binder, seen = make(tmp_path)
    good = {"files": [{"path": "f", "content": b""}], "settings": {}, "mcp": []}
    bound = binder.apply(Bind(1, 1, good | bad, dict.fromkeys(good | bad, "h")))
    assert (bound.ok, bound.code) == (False, code)
    assert bound.hint
    assert bound.applied == {}
    assert seen.calls == []
    assert list(tmp_path.iterdir()) == []


def test_a_link_in_the_home_is_an_error_not_a_way_out(tmp_path: Path) -> None:
    home, outside = tmp_path / "home", tmp_path / "outside"
    home.mkdir()
    outside.mkdir()
    (home / ".agent").symlink_to(outside)
    binder, _ = make(home)
    bound = binder.apply(Bind(1, 1, {"files": [{"path": ".agent/auth", "content": b"s"}]}, {"files": "h"}))
    assert (bound.ok, bound.code) == (False, "config.invalid_section")
    assert list(outside.iterdir()) == []


def test_an_agent_that_cannot_start_is_told_and_tried_again(tmp_path: Path) -> None:
    binder, seen = make(tmp_path)
    seen.refuse = SpawnError("agent.not_in_image", "'x' is not in the sandbox", "install it")
    parts: dict[str, Any] = {"process": SPEC.encode(), "mcp": []}
    bound = binder.apply(Bind(1, 1, parts, {"process": "p", "mcp": "m"}))
    assert (bound.ok, bound.code, bound.hint) == (False, "agent.not_in_image", "install it")
    assert bound.applied == {"mcp": "m"}
    seen.refuse = None
    assert binder.apply(Bind(2, 1, parts, {"process": "p", "mcp": "m"})).ok
    assert [name for name, _ in seen.calls] == ["mcp", "process"]


def test_a_part_that_failed_half_way_counts_as_nothing(tmp_path: Path) -> None:
    binder, _ = make(tmp_path)

    def bind(hash_: str, *paths: str) -> Any:
        files = [{"path": path, "content": hash_.encode()} for path in paths]
        return binder.apply(Bind(1, 1, {"files": files}, {"files": hash_}))

    assert bind("one", "a", "b/c").ok
    (tmp_path / "d").symlink_to(tmp_path)
    failed = bind("two", "a", "d/c")
    assert (failed.ok, failed.applied) == (False, {})
    # What was before is not what is there now, so it is not taken for done.
    assert bind("one", "a", "b/c").ok
    assert (tmp_path / "a").read_bytes() == b"one"


def test_too_many_files_are_refused_not_cut(tmp_path: Path) -> None:
    binder, _ = make(tmp_path)
    files = [{"path": f"f{number}", "content": b""} for number in range(MAX_FILES + 1)]
    bound = binder.apply(Bind(1, 1, {"files": files}, {"files": "h"}))
    assert (bound.ok, bound.applied) == (False, {})
    assert list(tmp_path.iterdir()) == []


# -- claims ------------------------------------------------------------------------------------------


def claim(binder: Binder, session: str = "s1", parts: dict[str, Any] | None = None, **how: bool) -> Any:
    parts = {"claim": {"session": session, **how}, **(parts or {})}
    return binder.apply(Bind(1, 1, parts, {name: f"h-{name}" for name in parts} | {"claim": session}))


def test_a_claim_is_applied_before_everything_else_and_told_in_hello(tmp_path: Path) -> None:
    binder, seen = make(tmp_path)
    bound = claim(binder, "s1", {"mcp": [], "settings": {}, "process": SPEC.encode()}, moved=True, keep_ahead=False)
    assert bound.ok
    assert bound.effect["claim"] == "now"
    assert binder.applied["claim"] == "s1"
    assert binder.session == "s1"
    assert [name for name, _ in seen.calls] == ["claim", "settings", "mcp", "process", "restart"]
    assert seen.calls[0] == ("claim", (True, False))


def test_a_claim_is_known_by_its_session_whatever_its_hash(tmp_path: Path) -> None:
    binder, seen = make(tmp_path)
    assert binder.apply(Bind(1, 1, {"claim": {"session": "s1"}}, {})).applied == {"claim": "s1"}
    assert binder.apply(Bind(2, 1, {"claim": {"session": "s1"}}, {"claim": "other"})).ok
    assert seen.calls == [("claim", (False, True))]


def test_a_claim_for_another_session_is_refused_with_all_that_came_with_it(tmp_path: Path) -> None:
    binder, seen = make(tmp_path)
    assert claim(binder, "s1").ok
    bound = claim(binder, "s2", {"mcp": []})
    assert (bound.ok, bound.code) == (False, "session.conflict")
    assert bound.applied == {"claim": "s1"}
    assert binder.session == "s1"
    assert [name for name, _ in seen.calls] == ["claim"]


def test_the_same_claim_again_does_nothing(tmp_path: Path) -> None:
    binder, seen = make(tmp_path)
    assert claim(binder, "s1", restart=True).ok
    assert claim(binder, "s1", restart=True).ok
    assert [name for name, _ in seen.calls] == ["claim", "restart"]


def test_a_sandbox_that_was_started_for_a_session_is_nobody_elses(tmp_path: Path) -> None:
    binder, seen = make(tmp_path, session="s1")
    assert binder.applied == {"claim": "s1"}
    assert claim(binder, "s2").code == "session.conflict"
    assert claim(binder, "s1", restart=True).ok
    assert seen.calls == []


def test_an_agent_that_is_not_claimed_is_left_its_time_to_end(tmp_path: Path) -> None:
    binder, seen = make(tmp_path)
    assert claim(binder).ok
    binder.apply(Bind(2, 2, {"process": SPEC.encode()}, {"process": "p"}))
    assert [name for name, _ in seen.calls] == ["claim", "process"]
