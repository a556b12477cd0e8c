"""What the lock files hold: versions and hashes, and no address of any machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NPM = sorted(ROOT.glob("docker/agents/*/package-lock.json"))
PIP = [*ROOT.glob("requirements*.txt"), *ROOT.glob("*/requirements.txt"), *ROOT.glob("docker/*/requirements.txt")]


@pytest.mark.parametrize("path", [*NPM, *PIP], ids=lambda path: str(path.relative_to(ROOT)))
def test_a_lock_file_names_no_address(path: Path) -> None:
    text = path.read_text()
    assert "://" not in text
    assert "index-url" not in text


@pytest.mark.parametrize("path", NPM, ids=lambda path: path.parent.name)
def test_each_npm_package_is_held_by_a_hash_or_comes_in_one_that_is(path: Path) -> None:
    packages = json.loads(path.read_text())["packages"]
    wanted = json.loads(path.with_name("package.json").read_text())
    assert packages[""].get("dependencies", {}) == wanted.get("dependencies", {})
    loose = [name for name, one in packages.items() if name and "integrity" not in one and not one.get("inBundle")]
    assert loose == []


@pytest.mark.parametrize("path", PIP, ids=lambda path: str(path.relative_to(ROOT)))
def test_each_python_package_is_pinned_and_hashed(path: Path) -> None:
    blocks = path.read_text().replace("\\\n", "").splitlines()
    pins = [line for line in blocks if line and not line.lstrip().startswith("#")]
    assert pins
    assert [line.split()[0] for line in pins if "==" not in line or "--hash=sha256:" not in line] == []
