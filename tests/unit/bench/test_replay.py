"""The replay of the sample gives what docs/benchmarks.md says of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import replay
from broker.session.replay import DAY


def test_the_sample_is_read_whole() -> None:
    users = replay.sample()
    assert (len(users), sum(map(len, users.values()))) == (100, 29_887)
    for minutes in users.values():
        assert minutes == sorted(set(minutes))
        assert len(minutes) > 1
        assert 0 <= minutes[0] < minutes[-1] < DAY


def test_gaps_are_added_up(tmp_path: Path) -> None:
    file = tmp_path / "s.csv"
    file.write_text("app,gaps\na,5 10*3 1\nb,0 2*2\n")
    assert replay.sample(file) == {"a": [5, 15, 25, 35, 36], "b": [0, 2, 4]}


def test_a_whole_trace_is_read(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    head = "HashFunction,HashApp,HashOwner," + ",".join(f"minute_{minute}" for minute in range(1, DAY + 1))

    def row(app: str, *uses: int) -> str:
        return f"f,{app},o," + ",".join("2" if minute in uses else "0" for minute in range(DAY))

    file.write_text("\n".join([head, row("a", 0, 7), row("b", 3), row("a", 7, DAY - 1)]) + "\n")
    assert replay.trace(file) == {"a": [0, 7, DAY - 1]}


def test_the_hybrid_is_colder_than_an_hour_and_warmer_than_as_much_memory() -> None:
    by_name = {one.policy.strip(): one for one in replay.compare(replay.sample())}
    cold = {name: one.cold for name, one in by_name.items()}
    idle = {name: one.idle for name, one in by_name.items()}
    assert cold["fixed 10 min"] == 1033
    assert cold["fixed 20 min"] == 525
    assert cold["fixed 60 min"] == 224
    assert cold["hybrid, else 10 min"] == 336
    assert idle["fixed 20 min"] < idle["hybrid, else 10 min"] < idle["fixed 60 min"]
    assert cold["fixed 26 min, as much idle"] == 451
    assert idle["hybrid, else 10 min"] <= idle["fixed 26 min, as much idle"]


def test_targets_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert replay.main(["--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [(one["name"], one["ok"]) for one in told["targets"]] == [
        ("replay.cold_over_equal_idle", True),
        ("replay.p75_over_equal_idle", True),
    ]
    assert told["figures"]["sample"][0]["policy"] == "fixed 10 min"
