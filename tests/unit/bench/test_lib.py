"""What the benchmarks share: figures are computed right, and a missed target is an exit status."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from bench import lib


def test_a_missed_target_is_an_exit_status_and_in_the_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = lib.Report("x", tables={"T": [["a", "b"], ["1", "2"]]})
    report.targets.append(lib.target("good", "ms", 1.0, 2.0))
    assert report.finish(None) == 0
    report.targets.append(lib.target("bad", "ms", 3.0, 2.0))
    assert report.finish(str(tmp_path / "out.json")) == 1
    assert "MISSED" in capsys.readouterr().out
    targets = json.loads((tmp_path / "out.json").read_text())["targets"]
    assert targets == [
        {"name": "good", "unit": "ms", "value": 1.0, "limit": 2.0, "ok": True, "least": False},
        {"name": "bad", "unit": "ms", "value": 3.0, "limit": 2.0, "ok": False, "least": False},
    ]


def test_json_on_stdout_leaves_the_tables_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    lib.Report("x", targets=[lib.target("t", "s", 1, 2)]).finish("-")
    captured = capsys.readouterr()
    assert json.loads(captured.out)["benchmark"] == "x"
    assert "Targets" in captured.err


def test_rounds_are_interleaved_in_turning_order() -> None:
    order: list[str] = []

    def run(name: str) -> dict[str, float]:
        order.append(name)
        return {"f": float(len(order))}

    seen = lib.interleaved(["a", "b"], 3, run)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert seen == {"a": {"f": [1.0, 4.0, 5.0]}, "b": {"f": [2.0, 3.0, 6.0]}}
    assert lib.medians(seen) == {"a": {"f": 4.0}, "b": {"f": 3.0}}


def test_a_quantile_of_what_a_histogram_saw_in_between() -> None:
    registry = CollectorRegistry()
    histogram = Histogram("lag", "Lag.", buckets=(1, 2, 5), registry=registry)
    for _ in range(100):
        histogram.observe(4)
    before = lib.histogram(generate_latest(registry).decode(), "lag")
    for value in [0.5] * 98 + [1.5] * 2:
        histogram.observe(value)
    between = lib.difference(lib.histogram(generate_latest(registry).decode(), "lag"), before)
    assert (lib.quantile(between, 0.5), lib.quantile(between, 0.99)) == (1, 2)
    assert lib.quantile(before, 0.5) == 5
    assert lib.quantile({}, 0.5) == 0


def test_percentiles() -> None:
    values = [float(number) for number in range(100, 0, -1)]
    assert (lib.percentile(values, 0.5), lib.percentile(values, 0.99), lib.percentile([7.0], 0.99)) == (51, 100, 7)


def test_the_cpu_time_of_a_process_is_its_own() -> None:
    before, own = lib.cpu_seconds(os.getpid()), time.process_time()
    while time.process_time() - own < 0.02:
        pass
    assert lib.cpu_seconds(os.getpid()) - before == pytest.approx(time.process_time() - own, abs=0.01)


def test_a_child_is_waited_for_and_killed() -> None:
    code = "import time\nprint('ready', flush=True)\ntime.sleep(60)"
    with lib.child([sys.executable, "-c", code]) as process:
        assert process.poll() is None
    assert process.returncode is not None


def test_a_child_that_ends_at_once_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="ended with 3"), lib.child([sys.executable, "-c", "raise SystemExit(3)"]):
        pass


def test_children_of_a_process_are_found_whichever_thread_started_them() -> None:
    found = []

    def start() -> None:
        with lib.child(["sleep", "30"], waits=lambda: True) as process:
            found.append(process.pid in lib.children_of(os.getpid()))

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert found == [True]


def test_a_figure_may_have_to_be_large_enough() -> None:
    assert lib.target_least("calls", "", 4000, 4000).ok
    assert not lib.target_least("calls", "", 3999, 4000).ok


def test_ports_that_are_asked_for_together_differ() -> None:
    assert len(set(lib.free_ports(20))) == 20
