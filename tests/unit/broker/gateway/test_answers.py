"""The gateway's own answers."""

from __future__ import annotations

import json

import pytest

from broker.errors import Code, CortexError
from broker.gateway.answers import answer, denied


@pytest.mark.parametrize("code", list(Code))
def test_every_error_can_be_answered(code: Code) -> None:
    head, _, body = answer(CortexError(code, "What", hint="Do.", cause="why"), close=True).partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert int(lines[0].split(b" ")[1]) == code.http_status
    assert b"content-length: %d" % len(body) in lines
    assert b"connection: close" in lines
    got = json.loads(body)
    assert (got["code"], got["hint"], got["error"]["message"]) == (code.slug, "Do.", "What. Do.")


def test_head_gets_no_body() -> None:
    assert answer(denied("h", 1), close=False, head_only=True).endswith(b"\r\n\r\n")


def test_what_was_denied_can_be_copied_into_the_list() -> None:
    assert '"h"' in denied("h", 443).hint
    assert '"h:80"' in denied("h", 80).hint


@pytest.mark.parametrize(("said", "sent"), [(0.2, b"1"), (12.1, b"13"), (30, b"30")])
def test_a_client_is_told_when_to_come_again(said: float, sent: bytes) -> None:
    error = CortexError(Code.GATEWAY_LIMITED, "What", hint="Do.", details={"retry_after_s": said})
    lines = answer(error, close=False).split(b"\r\n")
    assert b"retry-after: " + sent in lines
    assert b"x-should-retry: false" not in lines


def test_what_may_be_tried_again_says_so_and_what_may_not_does_not() -> None:
    assert b"\r\nretry-after: 1\r\n" in answer(CortexError(Code.GATEWAY_DOWN, "What", hint="Do."), close=False)
    assert b"retry-after" not in answer(denied("h", 1), close=False)
    assert b"\r\nx-should-retry: false\r\n" in answer(CortexError(Code.BUDGET_SPENT, "What", hint="Do."), close=False)
