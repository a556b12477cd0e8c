"""What the shim remembers, without any connection."""

from __future__ import annotations

from typing import Any

import pytest

from broker.cli.resume import Memory
from broker.errors import Code, CortexError

Message = dict[str, Any]


def memory() -> Memory:
    """One whose IDE has initialized and opened conversation s1."""
    fresh = Memory(iter(f"m{number}" for number in range(100)).__next__)
    fresh.from_ide(request(0, "initialize", protocolVersion=1))
    fresh.from_broker({"jsonrpc": "2.0", "id": 0, "result": {"_meta": place(1)}})
    fresh.from_ide(request(1, "session/new", cwd="/home/me", mcpServers=[]))
    fresh.from_broker({"jsonrpc": "2.0", "id": 1, "result": {"sessionId": "s1", "_meta": place(2)}})
    return fresh


def request(ident: Any, method: str, **params: Any) -> Message:
    return {"jsonrpc": "2.0", "id": ident, "method": method, "params": params}


def place(seq: int, epoch: str = "e") -> Message:
    return {"cortex": {"epoch": epoch, "seq": seq}}


def update(seq: int, epoch: str = "e", kind: str = "agent_message_chunk") -> Message:
    params = {"sessionId": "s1", "update": {"sessionUpdate": kind}, "_meta": place(seq, epoch)}
    return {"jsonrpc": "2.0", "method": "session/update", "params": params}


def prompt(ident: Any, **meta: Any) -> Message:
    return request(ident, "session/prompt", sessionId="s1", prompt=[], **({"_meta": meta} if meta else {}))


def resumed(known: Memory, replay: list[Message]) -> list[Message]:
    """Plays a reconnect whose session/load replays; returns what the IDE gets."""
    told = []
    for own in known.resume():
        if own["method"] == "session/load":
            for message in replay:
                told += known.from_broker(message)[0]
        answer = {"jsonrpc": "2.0", "id": own["id"], "result": {}}
        assert known.is_own(answer)
        told += known.from_broker(answer)[0]
    return told


def test_messages_pass_both_ways_untouched() -> None:
    known = memory()
    message = request("x", "session/set_mode", sessionId="s1")
    assert known.from_ide(message) is message
    live = update(3)
    assert known.from_broker(live) == ([live], [])
    assert known.from_broker(live)[0][0] is live


def test_a_new_connection_is_initialized_and_loads_what_was_open() -> None:
    known = memory()
    first, second = known.resume()
    assert (first["method"], first["params"]) == ("initialize", {"protocolVersion": 1})
    assert (second["method"], second["params"]) == (
        "session/load",
        {"cwd": "/home/me", "mcpServers": [], "sessionId": "s1"},
    )
    assert first["id"] != second["id"]


def test_before_the_ide_has_spoken_there_is_nothing_to_resume() -> None:
    fresh = Memory(lambda: "m")
    assert fresh.resume() == []
    fresh.from_ide(request(0, "initialize"))
    assert fresh.resume() == []
    assert [message["id"] for message in fresh.again()[0]] == [0]


def test_what_was_seen_is_not_shown_again_and_what_was_missed_is() -> None:
    known = memory()
    for seq in (3, 5):
        known.from_broker(update(seq))
    replay = [update(seq) for seq in (3, 5, 6, 7)]
    assert resumed(known, replay) == replay[2:]
    late = update(8)
    assert known.from_broker(late)[0] == [late]


def test_a_second_reconnect_knows_what_the_first_replayed() -> None:
    known = memory()
    known.from_broker(update(3))
    resumed(known, [update(3), update(4)])
    assert resumed(known, [update(3), update(4), update(5)]) == [update(5)]


def test_ones_own_prompt_is_not_echoed_after_a_reconnect() -> None:
    known = memory()
    known.from_ide(prompt(2))
    echo, word = update(3, kind="user_message_chunk"), update(4)
    assert resumed(known, [echo, word]) == [word]


@pytest.mark.parametrize(
    "strange", [update(9, epoch="other"), {"method": "session/update", "params": {"sessionId": "s1"}}]
)
def test_a_replay_without_a_known_place_is_left_out(strange: Message) -> None:
    known = memory()
    known.from_broker(update(3))
    assert resumed(known, [strange]) == []
    assert known.from_broker(strange)[0] == [strange]


def test_a_prompt_runs_once_however_often_it_is_sent() -> None:
    known = memory()
    sent = known.from_ide(prompt(2))
    assert sent["params"]["_meta"]["cortex"]["messageId"] == "m0"
    resumed(known, [])
    again, lost = known.again()
    assert (again, lost) == ([sent], [])
    answer = {"jsonrpc": "2.0", "id": 2, "result": {"stopReason": "end_turn"}}
    assert known.from_broker(answer) == ([answer], [])
    assert known.from_broker(answer) == ([], [])
    assert known.again() == ([], [])


def test_a_message_id_of_the_ide_stays() -> None:
    sent = memory().from_ide(prompt(2, cortex={"messageId": "mine", "x": 1}, other=2))
    assert sent["params"]["_meta"] == {"cortex": {"messageId": "mine", "x": 1}, "other": 2}


def test_what_could_do_harm_twice_is_answered_with_an_error() -> None:
    known = memory()
    known.from_ide(request(2, "_vendor/charge"))
    known.from_ide(request("2", "session/list"))
    again, lost = known.again()
    assert [message["id"] for message in again] == ["2"]
    assert [(message["id"], message["error"]["data"]["code"]) for message in lost] == [(2, "broker.unreachable")]
    assert known.waiting
    assert [message["id"] for message in known.give_up(CortexError(Code.FORBIDDEN, "no", hint="stop"))] == ["2"]
    assert not known.waiting


def test_a_permission_request_that_comes_again_is_asked_once() -> None:
    known = memory()
    ask = request(7, "session/request_permission", sessionId="s1", _meta=place(4))
    assert known.from_broker(ask) == ([ask], [])
    resumed(known, [])
    assert known.from_broker(ask) == ([], [])
    answer = {"jsonrpc": "2.0", "id": 7, "result": {"outcome": {"outcome": "cancelled"}}}
    assert known.from_ide(answer) is answer
    resumed(known, [])
    assert known.from_broker(ask) == ([], [answer])


def test_an_answer_to_nothing_goes_nowhere() -> None:
    assert memory().from_broker({"jsonrpc": "2.0", "id": "1", "result": {}}) == ([], [])


def test_a_conversation_that_could_not_be_opened_is_not_loaded() -> None:
    known = memory()
    known.from_ide(request(2, "session/new", cwd="/"))
    known.from_broker({"jsonrpc": "2.0", "id": 2, "error": {"code": 1, "message": "no"}})
    assert [message["method"] for message in known.resume()] == ["initialize", "session/load"]
