"""docs/gateway.md is held against the schema and the metrics: what it names is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from broker import metrics
from broker.config import AgentConfig, Config, ProviderConfig
from broker.session.sections import SandboxConfig

TEXT = (Path(__file__).parents[3] / "docs/gateway.md").read_text()
NAMES = {name for name in re.findall(r"`([a-z0-9_]+)(?:\{[a-z,]+\})?`", TEXT) if re.match(r"(cortex|gen_ai)_", name)}


def keys(model: type[BaseModel]) -> set[str]:
    """Of the table and those below it."""
    found = set(model.model_fields)
    for field in model.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= keys(field.annotation)
    return found


def test_every_metric_is_one() -> None:
    known = {sample.name for family in metrics.REGISTRY.collect() for sample in family.samples}
    known |= {family.name for family in metrics.REGISTRY.collect()}
    known |= {f"{family.name}_total" for family in metrics.REGISTRY.collect() if family.type == "counter"}
    assert len(NAMES) > 8
    assert known >= NAMES


@pytest.mark.parametrize("key", sorted({*re.findall(r"[`|,] ?`?([a-z_]+) = ", TEXT), "max_fails", "fail_timeout_s"}))
def test_every_setting_is_one(key: str) -> None:
    assert key in keys(Config) | keys(ProviderConfig) | keys(AgentConfig) | keys(SandboxConfig) | {"document"}
