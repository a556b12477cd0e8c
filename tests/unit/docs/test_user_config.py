"""docs/user-config.md is held against the schema: every section is there, every example is valid."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from broker.session.sections import SECTIONS, validate

TEXT = (Path(__file__).parents[3] / "docs/user-config.md").read_text()
EXAMPLES = re.findall(r"```json (\w+)\n(.*?)```", TEXT, re.DOTALL)


def test_every_section_has_a_heading_and_an_example_in_order() -> None:
    assert re.findall(r"^## (\w+)$", TEXT, re.MULTILINE) == list(SECTIONS)
    assert [name for name, _ in EXAMPLES] == list(SECTIONS)


@pytest.mark.parametrize(("section", "example"), EXAMPLES)
def test_examples_are_valid(section: str, example: str) -> None:
    value = json.loads(example)
    assert validate(section, value) == value
