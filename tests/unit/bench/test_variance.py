from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import host
from bench.variance import TOTAL, Run, groups, host_table, read, record, spread, stage_table


def run(name: str, driver: str = "docker", **stages: float) -> Run:
    return Run(1.0, driver, {"host": name, "region": "eu", "accelerator": ""}, {TOTAL: sum(stages.values()), **stages})


def test_what_is_recorded_is_read_again_and_grows(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "runs.jsonl"
    record(path, [run("a", start=10.0)])
    record(path, [run("b", start=20.0)])
    assert read(path) == [run("a", start=10.0), run("b", start=20.0)]


@pytest.mark.parametrize("line", ["", "[]", "{}", '{"at": 1, "driver": "x", "host": {}, "stages": {"a": "b"}}'])
def test_a_line_that_is_no_run_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "runs.jsonl"
    record(path, [run("a", start=10.0)])
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=r"runs\.jsonl:2"):
        read(path)


def test_hosts_and_drivers_are_told_apart_with_their_slowest_stages() -> None:
    runs = [run("a", start=10.0, hello=30.0, bind=1.0, agent=2.0), run("b", start=50.0, hello=3.0), run("a", "process")]
    rows = host_table(runs)[1:]
    assert [row[:3] for row in rows] == [
        ["docker", "a (eu)", "1"],
        ["docker", "b (eu)", "1"],
        ["process", "a (eu)", "1"],
    ]
    assert rows[0][-1] == "hello 30, start 10, agent 2"
    assert rows[1][3] == "53.0"


def test_stages_come_slowest_first_with_their_spread() -> None:
    runs = [run("a", start=float(ms), hello=100.0) for ms in (10, 20, 30, 40)]
    rows = stage_table(runs)[1:]
    assert [row[0] for row in rows] == [TOTAL, "hello", "start"]
    assert rows[1][-1] == "0%"
    assert spread([10.0, 20.0, 30.0, 40.0]) == pytest.approx(2 / 3)
    assert list(groups(runs)) == [("docker", "a (eu)")]


@pytest.mark.parametrize(
    ("told", "region"), [({"v1": {"region": "eu-1"}}, "eu-1"), ({"v1": {"region": 1}}, ""), ({"v1": []}, ""), ([], "")]
)
def test_the_cloud_is_believed_only_where_it_says_something(tmp_path: Path, told: Any, region: str) -> None:
    path = tmp_path / "instance-data.json"
    path.write_text(json.dumps(told))
    assert host.cloud("region", path) == region
    assert host.cloud("region", tmp_path / "none") == ""


def test_accelerators_are_counted_by_model(tmp_path: Path) -> None:
    for number, model in enumerate(("A10", "A10", "L4")):
        (tmp_path / f"{number}").mkdir()
        (tmp_path / f"{number}" / "information").write_text(f"Model: \t\t {model}\nIRQ: 1\n")
    assert host.accelerator(tmp_path) == "A10 x2, L4 x1"
    assert host.accelerator(tmp_path / "none") == ""


def test_facts_are_json_and_the_operator_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORTEX_REGION", "home")
    told = host.facts()
    assert told["region"] == "home"
    assert told["memory_bytes"] > 0
    json.dumps(told)
