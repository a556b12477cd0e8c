"""The alert rules that are shipped: sound, about metrics that exist, firing when they should, with words that help."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from prometheus_client import Metric

from broker.config import Config, PoolAgentConfig, ProviderConfig
from broker.metrics import REGISTRY
from broker.settings import dotted, leaves
from tests.host import missing

ROOT = Path(__file__).parents[3]
RULES = ROOT / "prometheus" / "cortex-rules.yml"
CASES = Path(__file__).with_name("alerts.yml")
TEXT = "\n".join(line for line in RULES.read_text().splitlines() if not line.startswith("#"))
ALERTS = dict(re.findall(r"- alert: (\w+)\n(.*?)(?=\n      - alert|\n  - name|\Z)", TEXT, re.S))
METRIC = r"\b(?:cortex|gen_ai_client|gen_ai_server)_\w+"
FROM_PROMETHEUS = {"job", "instance"}


def promtool(*arguments: str) -> str:
    """What it prints; a failure is one of the test."""
    if shutil.which("promtool") is None:
        missing("promtool is not installed (Debian: prometheus)")
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=50, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_prometheus_takes_them() -> None:
    assert f"{len(ALERTS)} rules found" in promtool("check", "rules", str(RULES))


def test_they_fire_when_they_should_and_only_then() -> None:
    assert "SUCCESS" in promtool("test", "rules", str(CASES))


def test_each_is_tried() -> None:
    assert set(re.findall(r'alertname="(\w+)"', CASES.read_text())) == set(ALERTS)


def declared() -> dict[str, Metric]:
    """By the name that a scrape shows."""
    return {metric.name + ("_total" if metric.type == "counter" else ""): metric for metric in REGISTRY.collect()}


@pytest.mark.parametrize("alert", sorted(ALERTS))
def test_its_metrics_exist(alert: str) -> None:
    expression = ALERTS[alert].partition("annotations:")[0]
    names = set(re.findall(METRIC, expression))
    assert names
    assert {name.removesuffix("_count") for name in names} <= set(declared())


@pytest.mark.parametrize("alert", sorted(ALERTS))
def test_its_labels_exist(alert: str) -> None:
    expression = ALERTS[alert].partition("annotations:")[0]
    known: set[str] = set(FROM_PROMETHEUS)
    for name in re.findall(METRIC, expression):
        collector = REGISTRY._names_to_collectors[name]
        labels = set(getattr(collector, "_labelnames", ()))
        known |= labels
        for picked in re.findall(name + r"\{([^}]*)\}", expression):
            assert set(re.findall(r"(\w+)(?:=|!=|=~)\"", picked)) <= labels
    for grouped in re.findall(r"\b(?:by|on) \(([^)]*)\)", expression):
        assert set(grouped.split(", ")) <= known
    assert set(re.findall(r"\$labels\.(\w+)", ALERTS[alert])) <= known


@pytest.mark.parametrize("alert", sorted(ALERTS))
def test_it_says_what_to_do(alert: str) -> None:
    body = ALERTS[alert]
    assert re.search(r"severity: (critical|warning)", body)
    summary, description = body.partition("summary: ")[2].split("description: >-")
    assert summary.strip()
    assert len(description.split()) > 12
    assert "{{ $labels.instance }}" in summary


def test_the_settings_that_they_name_exist() -> None:
    keys = {dotted(key) for key, _ in leaves(Config())} | {
        f"pool.agents.NAME.{name}" for name in PoolAgentConfig.model_fields
    }
    keys |= {f"gateway.providers.NAME.{name}" for name in ProviderConfig.model_fields}
    keys |= {key.rpartition(".")[0] for key in keys}
    named = set(re.findall(r"\b(?:pool|gateway)(?:\.\w+)+", TEXT))
    assert named
    assert named <= keys


def test_the_words_of_the_log_that_they_name_are_said() -> None:
    source = "".join(path.read_text() for path in (ROOT / "broker").rglob("*.py"))
    events = set(re.findall(r"log's `(\w+)`", TEXT))
    assert events
    assert all(f'"{event}"' in source for event in events)


def test_the_verbs_that_they_name_exist() -> None:
    reference = (ROOT / "docs" / "cli.md").read_text()
    verbs = set(re.findall(r"`(cortex(?: [a-z]+)+)`", TEXT))
    assert verbs
    assert all(f"## {verb}\n" in reference for verb in verbs)
