"""`cortex activity` against the control API on a real socket."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from broker.session.activity import DAY, HOUR
from broker.session.forecast import Expected
from tests.unit.broker.cli.test_verbs import Run, data, run
from tests.unit.broker.control.conftest import Api, api
from tests.unit.broker.control.test_activity import NOON

__all__ = ["api", "run"]


@pytest.fixture
def log(tmp_path: Path, api: Api) -> str:
    """Ann comes at noon on ten days, each time a minute after it was said; the clock says the morning after."""
    api.clock[0] = float(NOON + 10 * DAY - 3 * HOUR)
    file = tmp_path / "log.csv"
    lines = ["time,user,kind"]
    for day in range(10):
        lines += [f"{NOON + day * DAY + 240},ann,intent", f"{NOON + day * DAY + 300},ann,request"]
    file.write_text("\n".join([*lines, f"{NOON},bob,"]) + "\n")
    return str(file)


async def test_a_log_is_imported_once(run: Run, log: str) -> None:
    status, out, err = await run("activity", "import", log)
    assert (status, out) == (0, "")
    assert "read 21 entries of 2 users from 2023-11-14 12:00 to 2023-11-23 12:05 UTC" in err
    assert "21 minutes are new, 0 were known, 0 are too old, 0 lie ahead" in err
    again = await data(run, "activity", "import", log)
    assert (again["new"], again["known"], again["dry_run"]) == (0, 21, False)


async def test_a_dry_run_asks_nobody(run: Run, log: str, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORTEX_CONTROL_URL", "http://127.0.0.1:1")
    told = await data(run, "activity", "import", log, "--dry-run")
    assert (told["entries"], told["users"], told["dry_run"]) == (21, 2, True)
    assert (await api.call("GET", "/v1/activity"))[1]["users"] == []


async def test_stdin_is_read(run: Run, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    api.clock[0] = NOON + 60.0
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps({"ts": NOON, "user": "ann"})))
    assert (await data(run, "activity", "import", "-"))["new"] == 1


async def test_what_is_wrong_is_told_by_line_and_nothing_is_imported(run: Run, tmp_path: Path, api: Api) -> None:
    file = tmp_path / "log.csv"
    file.write_text(f"{NOON},ann\nnoon,ann\n")
    status, _, err = await run("activity", "import", str(file))
    assert status == 1
    assert "line 2" in err
    assert "request.invalid" in err
    assert (await api.call("GET", "/v1/activity"))[1]["users"] == []
    file.write_bytes(b"\xff\xfe\x00")
    assert "cannot read" in (await run("activity", "import", str(file)))[2]
    assert "cannot read" in (await run("activity", "import", str(tmp_path / "none")))[2]


async def test_everybody_is_shown_with_a_plot(run: Run, log: str) -> None:
    assert "cortex activity import" in (await run("activity"))[2]
    await run("activity", "import", log)
    _, out, _ = await run("activity", "--limit", "1")
    lines = out.splitlines()
    assert lines[0].split() == ["user", "minutes", "uses", "last", "hour", "(UTC)"]
    assert lines[1].split() == ["ann", "10", "10", "2023-11-23", "12:00"]
    assert "bob" not in out
    assert "busiest  Tue 12:00 (1.5)" in out
    assert "\x1b" not in out
    assert lines[-6].endswith("@"), "Tuesday, when both were there"
    assert "Mon  " not in (await run("activity", "--no-plot"))[1]
    told = await data(run, "activity")
    assert [one["user"] for one in told["users"]] == ["ann", "bob"]


async def test_one_user_is_shown(run: Run, log: str, api: Api) -> None:
    await run("activity", "import", log)
    _, out, _ = await run("activity", "ann")
    assert "10 minutes, from 2023-11-14 12:05 to 2023-11-23 12:05 UTC" in out
    assert "10 of 10 came after a word of intent, half within 60 s, 90 % within 60 s" in out
    assert "min after a use (recent)" in out
    assert (await run("activity", "show", "ann"))[1] == out
    assert (await data(run, "activity", "ann"))["minutes"] == 10
    assert "was not active" in (await run("activity", "cat"))[2]
    assert "user.invalid_id" in (await run("activity", ".."))[2]
    api.clock[0] = NOON + 10 * DAY + 250.0
    assert "2023-11-24 12:05 to 2023-11-24 12:16 UTC (hour of week)" in (await run("activity", "ann"))[1]


async def test_the_forecast_is_shown(run: Run, api: Api) -> None:
    _, out, _ = await run("activity", "forecast")
    assert "mode             forecast" in out
    warner = api.control.foresight._warner
    warner._told = [(Expected("ann", NOON, NOON + 600.0, 0.5, "histogram"), "would prewarm")]
    warner._ledger.expect(Expected("bob", NOON, NOON + 600.0, 0.5, "histogram"), NOON - 120.0)
    warner._ledger.sweep(NOON + 700.0)
    _, out, _ = await run("activity", "forecast")
    row = out.splitlines()[1].split()
    assert row == ["ann", "2023-11-14", "12:00", "2023-11-14", "12:10", "50%", "histogram", "would", "prewarm"]
    assert "did not come     1, sandboxes waited 12 min" in out
    assert (await data(run, "activity", "forecast"))["counts"]["wasted"] == 1


async def test_policies_are_replayed_without_a_broker(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CORTEX_CONTROL_URL", "http://127.0.0.1:1")
    file = tmp_path / "log.jsonl"
    file.write_text("".join(json.dumps({"time": NOON + n * 2700, "user": "ann"}) + "\n" for n in range(20)))
    _, out, err = await run("activity", "replay", str(file), "--fallback", "5")
    rows = {line.split("  ")[0]: line.split() for line in out.splitlines()}
    assert list(rows)[1:] == [
        *("fixed 10 min", "fixed 20 min", "fixed 60 min", "hybrid, else 5 min"),
        "the same, rests of 10 min at least",
    ]
    assert "1 users, 20 minutes with a use" in err
    told = await data(run, "activity", "replay", str(file))
    figures = {one["policy"]: one for one in told["policies"]}
    assert (figures["fixed 60 min"]["cold"], figures["fixed 10 min"]["cold"]) == (1, 20)
    assert figures["hybrid, else 10 min"]["cold"] == 4
    assert figures["hybrid, else 10 min"]["idle_ratio"] < 1
    file.write_text("")
    assert (await data(run, "activity", "replay", str(file)))["policies"][0]["idle_ratio"] is None
