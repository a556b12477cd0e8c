"""Secrets that are planted, used, refused and broken, and then looked for wherever the broker leaves anything.

They look like no key of any provider, so that it is not the log's redaction alone that hides them.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import BrokerProcess
from tests.e2e.probing import OPERATORS, Cli, cli, probed, token_endpoint

pytestmark = pytest.mark.timeout(180)

KEY, ACCESS, REFRESH, RENEWED, ROTATED, FILE, REFUSED, POOLED, REDIS = (
    f"planted {name} 5d81c0b7e2".replace(" ", "-")
    for name in ("key", "access", "refresh", "renewed", "rotated", "file", "refused", "pooled", "redis")
)
ALL = (KEY, ACCESS, REFRESH, RENEWED, ROTATED, FILE, REFUSED, POOLED, REDIS, OPERATORS)
OWN_FILES = {"vault.key", "operators.key", "pooled.key", "redis.key", "installation.key", "admin.token", "hook.secrets"}


def shapes(secret: str) -> Iterator[bytes]:
    """As it may be written: plain, hexadecimal, base64 at any offset, each way of escaping leaves it as it is."""
    raw = secret.encode()
    yield raw
    yield raw.hex().encode()
    for offset in range(3):
        text = base64.b64encode(bytes(offset) + raw)
        # The first and last digits hang on what stands beside it.
        yield text[4 if offset else 0 : -4]


NEEDLES = {needle: secret for secret in ALL for needle in shapes(secret)}
PATTERN = re.compile(b"|".join(re.escape(needle) for needle in NEEDLES))


def found_in(data: bytes) -> str:
    """Which secret is in ``data``; "" for none."""
    match = PATTERN.search(data)
    return NEEDLES[match.group()] if match else ""


def in_processes() -> dict[str, str]:
    """In the command lines and environments of all processes of the host."""
    found = {}
    for process in Path("/proc").iterdir():
        for name in ("cmdline", "environ"):
            try:
                secret = found_in((process / name).read_bytes()) if process.name.isdigit() else ""
            except OSError:
                continue
            if secret:
                found[f"{process.name}/{name}"] = secret
    return found


def in_files(*directories: Path) -> dict[str, str]:
    """In all files below, those aside that are made to hold a secret."""
    found = {}
    for directory in directories:
        for path in directory.rglob("*"):
            if path.is_file() and not path.is_symlink() and path.name not in OWN_FILES:
                secret = found_in(path.read_bytes())
                if secret:
                    found[str(path.relative_to(directory))] = secret
    return found


def in_containers() -> dict[str, str]:
    """In what the engine tells of its containers."""
    ids = subprocess.run(["docker", "ps", "-aq"], capture_output=True, text=True, check=True).stdout.split()
    told = {}
    for one in ids:
        facts = subprocess.run(["docker", "inspect", one], capture_output=True).stdout
        logs = subprocess.run(["docker", "logs", one], capture_output=True)
        secret = found_in(facts + logs.stdout + logs.stderr)
        if secret:
            told[one] = secret
    return told


class Answers:
    """The control API; every answer is looked through."""

    def __init__(self, broker: BrokerProcess) -> None:
        self._broker = broker

    async def ask(self, method: str, path: str, body: Any = None) -> Any:
        told = await self._broker.api(method, path, body)
        assert not found_in(json.dumps(told).encode()), (method, path)
        return told

    async def refused(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        problem = await self._broker.refused(method, path, body)
        assert not found_in(json.dumps(problem).encode()), (method, path, problem)
        return problem

    async def everything(self) -> None:
        """All that can be read."""
        for path in (
            *("/v1/sessions", "/v1/vault", "/metrics", "/readyz?verbose", "/v1/openapi.json", "/v1/pool", "/v1/usage"),
            "/v1/users/ann/egress",
            *(f"/v1/users/{user}/credentials" for user in ("ann", "bob", "cal")),
            *(f"/v1/users/{user}/credentials/anthropic" for user in ("ann", "bob", "cal")),
            *(f"/v1/sessions/{user}/main{rest}" for user in ("ann", "bob", "cal") for rest in ("", "/timeline")),
        ):
            await self.ask("GET", path)


def credential(user: str) -> str:
    return f"/v1/users/{user}/credentials/anthropic"


async def plant(answers: Answers) -> None:
    """One credential of each kind."""
    await answers.ask("PUT", credential("ann"), {"value": KEY})
    tokens = {"access_token": ACCESS, "refresh_token": REFRESH, "expires_at": time.time() - 5}
    await answers.ask("PUT", credential("bob"), {"kind": "oauth", "value": tokens})
    await answers.ask("PUT", credential("cal"), {"kind": "file", "value": {"token": FILE}})


def operators(directory: Path) -> str:
    """Settings with secrets of the operator's that the gateway is told with its policies; Redis is not there."""
    for name, secret in (("pooled", POOLED), ("redis", REDIS)):
        path = directory / f"{name}.key"
        path.write_text(secret)
        path.chmod(0o600)
    return f"""
[gateway.cache]
backend = "redis"
redis_url = "redis://127.0.0.1:1/0"
redis_password_file = "{directory}/redis.key"
[gateway.providers.pooled]
kind = "anthropic"
base_url = "PROVIDER/anthropic"
credential_files = ["{directory}/pooled.key"]
coalesce = true
[gateway.providers.pooled.cache]
enabled = true
with_randomness = true
[gateway.providers.pooled.limits.credential]
rpm = 1000
"""


async def use(ann: Cli, bob: Cli, cal: Cli) -> None:
    """Each reaches the provider, or the sandbox's CLI."""
    assert (await ann.call())["x-api-key"] == KEY
    assert (await ann.call(at="pooled"))["x-api-key"] == POOLED
    assert (await bob.call())["authorization"] == f"Bearer {RENEWED}"
    # Not printed: what an agent says is the user's conversation.
    assert "1" in await cal.run("grep -c planted ~/.cli/auth.json")
    assert (await cal.call({"x-api-key": "own"}))["x-api-key"] == "own"


async def provoke(broker: BrokerProcess, answers: Answers) -> None:
    """Refusals, and errors that nobody foresaw, around a secret."""
    two_lines = f"{REFUSED}\n{REFUSED}"
    for body in (
        *({"value": two_lines}, {"value": REFUSED, "kind": REFUSED}, {"value": REFUSED, REFUSED: 1}),
        *({"value": {"a": REFUSED}}, {"kind": "file", "value": REFUSED}, {"kind": "file", "value": [REFUSED]}),
        *({"kind": "oauth", "value": {REFUSED: REFUSED}}, {"kind": "oauth", "value": {"access_token": two_lines}}),
        *(f'{{"value": "{REFUSED}'.encode(), f'"{REFUSED}"'.encode(), b"\xff" + REFUSED.encode()),
    ):
        await answers.refused("PUT", credential("ann"), body)
    await answers.refused("PUT", "/v1/users/ann/credentials/antropic", {"value": REFUSED})
    with sqlite3.connect(broker.state_dir / "cortex.db", timeout=20) as db:
        kept = db.execute("SELECT * FROM vault").fetchall()
        db.execute("DELETE FROM vault")
    db.close()
    problem = await answers.refused("PUT", credential("ann"), {"value": REFUSED})
    assert problem["code"] == "broker.internal"
    assert "Traceback" in broker.log_tail(20_000), "an error that nobody foresaw is in the log"
    with sqlite3.connect(broker.state_dir / "cortex.db", timeout=20) as db:
        db.execute("INSERT INTO vault VALUES (?, ?, ?, ?)", kept[0])
        db.execute("UPDATE credentials SET sealed = (SELECT canary FROM vault) WHERE user = 'dan'")
    db.close()


async def inside(who: Cli) -> str:
    """What a sandbox of somebody else's holds of them: environments, command lines, files."""
    # Written apart, or the look would find itself.
    look = "p=planted-; s=-5d81c0b7e2; { env; cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline; } 2>/dev/null | "
    look += 'grep -aoE "${p}[a-z]+$s" | sort -u; grep -rlE "${p}[a-z]+$s" /vol /tmp /run /dev/shm 2>/dev/null'
    said = await who.run(look)
    return "\n".join(line for line in said.splitlines() if "exit code" not in line).strip()


async def test_no_secret_is_anywhere_but_where_it_belongs(place: Path, driver: str) -> None:
    answer = {"access_token": RENEWED, "refresh_token": ROTATED, "expires_in": 3600}
    debug = {"CORTEX_BROKER__LOG_LEVEL": "debug"}
    async with (
        token_endpoint(answer) as (url, asked),
        probed(place, driver, oauth=url, env=debug, more=operators(place)) as (broker, provider),
    ):
        answers = Answers(broker)
        await plant(answers)
        await answers.ask("PUT", credential("dan"), {"value": KEY})
        async with (
            cli(broker, provider, "ann") as ann,
            cli(broker, provider, "bob") as bob,
            cli(broker, provider, "cal") as cal,
        ):
            await use(ann, bob, cal)
            assert asked[0]["refresh_token"] == REFRESH
            await provoke(broker, answers)
            await answers.ask("POST", "/v1/vault/rotate")
            refused = await answers.refused("POST", "/v1/sessions", {"user": "dan", "wait": "ready"})
            assert refused["code"] == "vault.tampered"
            answer.clear()
            answer |= {"error": "invalid_grant", "error_description": f"{REFRESH} {ROTATED}"}
            for token in (ACCESS, RENEWED):
                tokens = {"access_token": token, "refresh_token": ROTATED, "expires_at": time.time() - 5}
                await answers.ask("PUT", credential("bob"), {"kind": "oauth", "value": tokens})
            await answers.everything()
            for who in (ann, bob):
                assert await inside(who) == ""
            assert in_processes() == {}
            if driver == "docker":
                assert await asyncio.to_thread(in_containers) == {}
            assert in_files(broker.state_dir, broker.directory) == {}
            await broker.kill()
            assert in_files(broker.state_dir, broker.directory) == {}
            await broker.start()
        await answers.ask("DELETE", "/v1/users/cal")
        await answers.ask("DELETE", credential("dan"))
        limits = Path(f"/proc/{broker.process.pid}/limits").read_text() if broker.process else ""
        assert re.search(r"Max core file size +0 +0 ", limits)
    assert in_files(place) == {}
    assert found_in(broker.log_path.read_bytes()) == ""
    assert len(broker.log_events()) > 30
    assert "redis_gone" in broker.log_path.read_text(), "the password was to be used"


def test_what_is_planted_would_be_found(tmp_path: Path) -> None:
    for number, secret in enumerate(ALL):
        texts = (
            secret,
            json.dumps({"a": secret}),
            secret.encode().hex(),
            base64.b64encode(f"x:{secret}".encode()).decode(),
        )
        for text in texts:
            (tmp_path / "leak").write_text(f"{number} {text}")
            assert in_files(tmp_path) == {"leak": secret}
    with subprocess.Popen(["sleep", "60"], env={"A": KEY, "PATH": "/usr/bin:/bin"}) as process:
        assert KEY in in_processes().values()
        process.kill()
