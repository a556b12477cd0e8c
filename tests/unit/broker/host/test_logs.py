from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from broker.host import logs


@pytest.fixture
def out() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield io.StringIO()
    root.handlers[:], level = before[0], before[1]
    root.setLevel(level)
    logging.getLogger("broker").setLevel(logging.NOTSET)
    structlog.reset_defaults()


def lines(out: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_json_lines_with_time_level_and_node(out: io.StringIO) -> None:
    logs.setup("info", "auto", node="n1", stream=out)
    structlog.get_logger("broker.x").info("started", port=5)
    (line,) = lines(out)
    assert line.items() >= {"event": "started", "level": "info", "node": "n1", "port": 5, "logger": "broker.x"}.items()
    assert line["timestamp"].endswith("Z")


def test_the_level_is_kept_and_can_be_changed(out: io.StringIO) -> None:
    logs.setup("info", "json", stream=out)
    log = structlog.get_logger("broker.x")
    log.debug("hidden")
    logs.setup("debug", "json", stream=out)
    log.debug("shown")
    assert [line["event"] for line in lines(out)] == ["shown"]


def test_libraries_speak_through_the_same_door_from_warning_up(out: io.StringIO) -> None:
    logs.setup("info", "json", stream=out)
    logging.getLogger("aiohttp").info("noise")
    logging.getLogger("aiohttp").warning("GET %s", "https://x/y?token=hunter2")
    (line,) = lines(out)
    assert line["event"] == "GET https://x/y?[redacted]"


def test_secrets_never_come_out(out: io.StringIO) -> None:
    logs.setup("debug", "json", stream=out)
    log = structlog.get_logger("broker.x")
    log.info(
        "call hunter2-free",
        authorization="Bearer hunter2hunter2",
        headers={"Cookie": "hunter2", "inner": [{"api_key": "hunter2"}]},
        text="sent Authorization: Bearer hunter2hunter2 to wss://u:hunter2@h/acp?ticket=hunter2",
        token="hunter2",
        subprotocols="acp.v1, bearer.hunter2hunter2",
        raw=b"hunter2",
        error=ValueError("key sk-hunter2hunter2"),
        jwt="got eyJhbGciOiJub25lIn0.hunter2hunter2.hunter2 from it",
        google="ya29.hunter2hunter2",
        refresh="was 1//0hunter2hunter2 of GOCSPX-hunter2hunter2",
        github="ghs_hunter2hunter2 and github_pat_hunter2hunter2",
        slack="xoxe-hunter2hunter2",
        attach="cx1.YW5uL21haW4.hunter2hunter2hunter2hunter2hunter2hunter2h",
    )
    try:
        raise ValueError("bad url http://h/x?key=hunter2")
    except ValueError:
        log.exception("failed")
    text = out.getvalue().replace("hunter2-free", "")
    assert "hunter2" not in text
    assert "ValueError" in text


def test_what_is_no_secret_stays() -> None:
    event = {"admin_token_file": "/x/admin.token", "tokens": 5, "token_count": 3, "url": "https://x/y", "path": "/a?"}
    assert logs.redact(None, "info", dict(event)) == event


@pytest.mark.parametrize("style", ["text"])
def test_text_has_no_colour_off_a_terminal(out: io.StringIO, style: Any) -> None:
    logs.setup("info", style, stream=out)
    structlog.get_logger("broker.x").info("started", secret="hunter2")
    assert "started" in out.getvalue()
    assert "\x1b" not in out.getvalue()
    assert "hunter2" not in out.getvalue()


@given(st.text(), st.from_regex(r"[A-Za-z0-9_-]{43}", fullmatch=True))
def test_an_attach_token_is_found_in_any_text(around: str, random: str) -> None:
    assert random not in logs.redacted(f"{around} cx1.YW5uL21haW4.{random} {around}")
