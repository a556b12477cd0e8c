from __future__ import annotations

import errno
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sandbox_agent.bind import MAX_FILES, Binder, Claim
from sandbox_agent.homefiles import UnsafePath
from sandbox_agent.port import AgentChannel
from sandbox_agent.spawn import SpawnError
from sandbox_agent.wire.messages import MAX_CREDENTIAL_FILE, AgentSpec, Attach, Bind


class Recorder:
    """Hub, runner and files in one: writes down what a bind asks for."""

    directory = "/run/credentials"

    agent_info = ""
    open_turns = 0
    clients = 0
    turns = 0
    ahead = ""
    pending = 0

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.refuse: SpawnError | None = None
        self.refuse_files: Exception | None = None
        self.relinked = 0

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

    def put(self, files: Sequence[tuple[str, bytes]]) -> None:
        if self.refuse_files is not None:
            raise self.refuse_files
        self.calls.append(("files", list(files)))

    def relink(self) -> None:
        if self.refuse_files is not None:
            raise self.refuse_files
        self.relinked += 1

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

    binder = Binder(home=str(home), hub=recorder, process=recorder, files=recorder, session=session, on_claim=claimed)
    return binder, recorder


def test_parts_are_applied_files_first_process_last_and_told_with_their_effect(tmp_path: Path) -> None:
    binder, seen = make(tmp_path)
    parts = {
        "process": SPEC.encode(),
        "mcp": [{"name": "m"}],
        "settings": {"allow_client_mcp": True},
        "files": [{"path": ".a/token", "mode": 0o600, "content": b"t"}],
    }
    hashes = {name: f"h-{name}" for name in parts}
    bound = binder.apply(Bind(7, 1, parts, hashes))
    assert (bound.id, bound.ok, bound.applied) == (7, True, hashes)
    assert bound.effect == {"files": "now", "settings": "now", "mcp": "next_session", "process": "next_turn"}
    assert [name for name, _ in seen.calls] == ["files", "settings", "mcp", "process"]
    assert seen.calls[0][1] == [(".a/token", b"t")]
    assert seen.calls[-1][1] == SPEC


def test_an_equal_hash_does_nothing(tmp_path: Path) -> None:
    binder, seen = make(tmp_path)
    parts: dict[str, Any] = {"mcp": [{"name": "m"}], "files": [{"path": "f", "content": b"1"}]}
    hashes = {"mcp": "1", "files": "2"}
    binder.apply(Bind(1, 1, parts, hashes))
    bound = binder.apply(Bind(2, 2, parts, hashes))
    assert bound.ok
    assert bound.effect == {"mcp": "now", "files": "now"}
    assert [name for name, _ in seen.calls] == ["files", "mcp"]


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
    ({"files": [{"path": "x", "content": b"1" * (MAX_CREDENTIAL_FILE + 1)}]}, "request.invalid"),
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


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UnsafePath("'.agent' on the way is a link"), "config.invalid_section"),
        (OSError(errno.EISDIR, "is a directory"), "config.invalid_section"),
        (OSError(errno.ENOSPC, "no space"), "store.disk_full"),
    ],
)
@pytest.mark.parametrize("part", ["files", "claim"])
def test_a_file_that_cannot_be_put_is_told_with_a_hint(tmp_path: Path, error: Exception, code: str, part: str) -> None:
    binder, seen = make(tmp_path)
    seen.refuse_files = error
    parts = {"files": [{"path": "a", "content": b"s"}], "claim": {"session": "s1"}}
    bound = binder.apply(Bind(1, 1, {part: parts[part]}, {part: "h"}))
    assert (bound.ok, bound.code, bound.applied) == (False, code, {})
    assert bound.hint
    seen.refuse_files = None
    assert binder.apply(Bind(2, 1, {part: parts[part]}, {part: "h"})).ok


def test_a_claim_links_the_files_that_are_bound_into_the_home_that_came(tmp_path: Path) -> None:
    binder, seen = make(tmp_path)
    files = {"files": [{"path": "a", "content": b"s"}]}
    binder.apply(Bind(1, 1, files, {"files": "h"}))
    bound = binder.apply(Bind(2, 1, files | {"claim": {"session": "s1", "moved": True}}, {"files": "h"}))
    assert bound.ok
    assert seen.relinked == 1
    assert [name for name, _ in seen.calls] == ["files", "claim"]


def test_a_sandbox_without_a_place_for_them_takes_no_credential_files(tmp_path: Path) -> None:
    binder, seen = make(tmp_path)
    seen.directory = ""
    bound = binder.apply(Bind(1, 1, {"files": [{"path": "a", "content": b"s"}]}, {"files": "h"}))
    assert (bound.ok, bound.code, bound.applied) == (False, "request.invalid", {})
    assert binder.apply(Bind(2, 1, {"files": []}, {"files": "h"})).ok
    assert list(tmp_path.iterdir()) == []


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
    binder, seen = make(tmp_path)

    def bind(hash_: str) -> Any:
        return binder.apply(Bind(1, 1, {"files": [{"path": "a", "content": hash_.encode()}]}, {"files": hash_}))

    assert bind("one").ok
    seen.refuse_files = UnsafePath("no")
    failed = bind("two")
    assert (failed.ok, failed.applied) == (False, {})
    seen.refuse_files = None
    # What was before may not be what is there now, so it is not taken for done.
    assert bind("one").ok
    assert seen.calls[-1] == ("files", [("a", b"one")])


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
