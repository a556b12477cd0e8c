"""The broker's own frames: which may stand where, and that they are bounded."""

from __future__ import annotations

from broker.front.frames import CLOSE, PING, PONG, TEXT, close_payload, frame
from broker.front.inserts import MAX_NOTES, Inserts


def test_nothing_waits_at_first() -> None:
    inserts = Inserts()
    assert not inserts
    assert inserts.take(in_message=False, congested=False) == b""


def test_only_the_newest_pong_is_sent() -> None:
    inserts = Inserts()
    for number in range(1000):
        inserts.pong(b"%d" % number)
    assert inserts.take(in_message=False, congested=False) == frame(PONG, b"999")
    assert not inserts


def test_a_notice_waits_for_the_end_of_a_message_a_ping_does_not() -> None:
    inserts = Inserts()
    inserts.note(b"{}")
    inserts.ping()
    assert inserts.take(in_message=True, congested=False) == frame(PING, b"")
    assert inserts
    assert inserts.take(in_message=False, congested=False) == frame(TEXT, b"{}")
    assert not inserts


def test_a_congested_client_gets_nothing_but_a_close() -> None:
    inserts = Inserts()
    inserts.note(b"{}")
    inserts.pong(b"p")
    assert inserts.take(in_message=False, congested=True) == b""
    inserts.close(1012, "later")
    closing = frame(TEXT, b"{}") + frame(CLOSE, close_payload(1012, "later"))
    assert inserts.take(in_message=False, congested=True) == closing
    assert not inserts


def test_a_close_between_fragments_drops_the_notices() -> None:
    inserts = Inserts()
    inserts.note(b"{}")
    inserts.close(1000, "")
    assert inserts.take(in_message=True, congested=False) == frame(CLOSE, close_payload(1000, ""))


def test_a_close_without_a_code_is_empty() -> None:
    inserts = Inserts()
    inserts.close(1005, "")
    assert inserts.take(in_message=False, congested=False) == frame(CLOSE, b"")


def test_old_notices_give_way() -> None:
    inserts = Inserts()
    for number in range(MAX_NOTES * 3):
        inserts.note(b"%d" % number)
    out = inserts.take(in_message=False, congested=False)
    assert out.startswith(frame(TEXT, b"%d" % (MAX_NOTES * 2)))
