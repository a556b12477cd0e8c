from __future__ import annotations

import json

import pytest

from broker.metrics import BRINGUP, BRINGUP_STAGE
from broker.session.timeline import ADOPTED, Timeline


class Clock:
    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


def timeline() -> tuple[Timeline, Clock]:
    clock = Clock()
    return Timeline("fake-timeline", clock=clock, wall=1000.0), clock


def count(*labels: str) -> float:
    return sum(
        sample.value
        for family in BRINGUP.collect()
        for sample in family.samples
        if sample.name.endswith("_count") and tuple(sample.labels.values()) == labels
    )


def test_stages_are_timed_and_told_in_the_order_they_began() -> None:
    line, clock = timeline()
    with line.stage("outer"):
        clock.now += 1
        with line.stage("inner"):
            clock.now += 2
    line.add("earlier", 50.0, 50.5)
    clock.now += 1
    line.finish("ready")
    view = line.view()
    assert json.loads(json.dumps(view)) == view
    assert view["total_ms"] == 4000
    assert view["started_at"] == 1000.0
    assert view["stages"] == [
        {"stage": "outer", "start_ms": 0, "ms": 3000},
        {"stage": "earlier", "start_ms": 0, "ms": 500},
        {"stage": "inner", "start_ms": 1000, "ms": 2000},
    ]


def test_a_stage_that_fails_is_timed_too() -> None:
    line, clock = timeline()

    def work() -> None:
        with line.stage("timeline-test"):
            clock.now += 1
            raise ValueError

    with pytest.raises(ValueError):
        work()
    assert line.stages == [("timeline-test", 0.0, 1.0)]
    text = [
        sample.value
        for family in BRINGUP_STAGE.collect()
        for sample in family.samples
        if sample.labels.get("stage") == "timeline-test" and sample.name.endswith("_sum")
    ]
    assert text == [1.0]


def test_only_what_became_ready_counts_as_a_bringup() -> None:
    line, clock = timeline()
    line.driver = "fake-outcome"
    assert line.view()["outcome"] == "running"
    line.finish("sandbox.died")
    assert count("cold", "fake-outcome") == 0
    clock.now += 1
    line.finish("ready")
    assert count("cold", "fake-outcome") == 1


def test_what_was_taken_over_is_no_bringup_to_measure() -> None:
    Timeline("taken-over", path=ADOPTED).finish("ready")
    Timeline("taken-over").finish("ready")
    assert (count("adopted", "taken-over"), count("cold", "taken-over")) == (0, 1)
