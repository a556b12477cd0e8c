"""docs/cli.md is what the program says."""

from __future__ import annotations

from pathlib import Path

from broker.cli.reference import reference

PAGE = Path(__file__).parents[4] / "docs" / "cli.md"


def test_the_page_does_not_drift() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference(), "run: python -m broker.cli.reference"


def test_every_verb_is_there() -> None:
    text = reference()
    for verb in ("serve", "demo", "doctor", "attach", "bench", "config check", "session timeline", "user config set"):
        assert f"## cortex {verb}\n" in text
