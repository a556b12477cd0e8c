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
