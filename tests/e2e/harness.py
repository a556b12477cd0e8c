"""A broker as users run it (``cortex serve`` in a process of its own) and a client that is not ours."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import io
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import acp
import aiohttp
from acp.ws import create_websocket_stream
from yarl import URL

ROOT = Path(__file__).parents[2]
START_S = 60.0
IMAGE = os.environ.get("CORTEX_TEST_IMAGE", "cortex-sandbox:latest")


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


class BrokerProcess:
    """``config`` is TOML behind what the harness writes itself; ``env`` is added to the environment."""

    def __init__(self, directory: Path, driver: str, config: str = "", *, env: Mapping[str, str] | None = None) -> None:
        self.directory = directory
        self.state_dir = directory / "state"
        self.front_port, self.control_port = free_port(), free_port()
        self.control_url = f"http://127.0.0.1:{self.control_port}"
        self.front_url = f"ws://127.0.0.1:{self.front_port}"
        self.config_path = directory / "config.toml"
        self.log_path = directory / "broker.log"
        self.driver = driver
        self.env = {"CORTEX_SANDBOX__DOCKER__IMAGE": IMAGE} | dict(env or {})
        self.process: asyncio.subprocess.Process | None = None
        self.write_config(config)

    def write_config(self, extra: str) -> None:
        """Writes the file whole, as an editor would: beside, then renamed."""
        text = (
            f'[broker]\nstate_dir = "{self.state_dir}"\nruntime_dir = "{self.directory / "run"}"\n'
            f'log_format = "json"\n'
            f'[front]\nlisten = "127.0.0.1:{self.front_port}"\n'
            f'[control]\nlisten = "127.0.0.1:{self.control_port}"\n'
            f'[sandbox]\ndriver = "{self.driver}"\n{extra}'
        )
        draft = self.config_path.with_suffix(".new")
        draft.write_text(text)
        draft.rename(self.config_path)

    async def spawn(self) -> asyncio.subprocess.Process:
        """``cortex serve``; waits for nothing."""
        with self.log_path.open("ab") as log:
            return await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "broker", "serve", "--config", str(self.config_path)),
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env={key: value for key, value in os.environ.items() if not key.startswith("CORTEX_")} | self.env,
            )

    async def start(self) -> None:
        """Returns when it answers that it is ready."""
        self.process = await self.spawn()
        try:
            async with asyncio.timeout(START_S), aiohttp.ClientSession() as http:
                while not await self._is_ready(http):
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise RuntimeError(f"the broker is not ready after {START_S:g} s\n{self.log_tail()}") from None

    async def _is_ready(self, http: aiohttp.ClientSession) -> bool:
        assert self.process is not None
        if self.process.returncode is not None:
            raise RuntimeError(f"the broker ended with {self.process.returncode}\n{self.log_tail()}")
        try:
            async with http.get(f"{self.control_url}/readyz") as response:
                return response.status == 200
        except aiohttp.ClientConnectionError:
            return False

    async def kill(self) -> None:
        """SIGKILL: nothing is put in order."""
        assert self.process is not None
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()

    async def stop(self) -> int:
        """SIGTERM; returns the exit status."""
        assert self.process is not None
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(30):
            return await self.process.wait()

    def log_tail(self, size: int = 6000) -> str:
        """What the broker said last."""
        return self.log_path.read_text()[-size:] if self.log_path.exists() else ""

    def log_events(self) -> list[dict[str, Any]]:
        """The log, parsed."""
        events = []
        for line in self.log_path.read_text().splitlines():
            if line.startswith("{"):
                events.append(json.loads(line))
        return events

    @property
    def admin_token(self) -> str:
        return (self.state_dir / "admin.token").read_text().strip()

    async def api(self, method: str, path: str, body: Any = None, *, expect: int | None = None) -> Any:
        """One call of the control API as an operator; returns the JSON."""
        headers = {"Authorization": f"Bearer {self.admin_token}"}
        async with (
            aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=150)) as http,
            http.request(method, self.control_url + path, json=body) as response,
        ):
            text = await response.text()
            fine = response.status == expect if expect is not None else response.status < 400
            assert fine, f"{method} {path}: {response.status} {text}\n{self.log_tail()}"
            return json.loads(text) if text.startswith(("{", "[")) else text

    async def drain_pool(self) -> None:
        """Takes the pools out of the settings; returns when no slot is left. Sessions have to be gone."""
        kept, pool = [], False
        for line in self.config_path.read_text().splitlines():
            if line.startswith("["):
                pool = line.startswith("[pool.agents")
            kept += [] if pool else [line]
        draft = self.config_path.with_suffix(".new")
        draft.write_text("\n".join(kept) + "\n")
        draft.rename(self.config_path)
        async with asyncio.timeout(30):
            while os.listdir(self.state_dir / "slots"):
                await asyncio.sleep(0.05)

    async def refused(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """The problem details of a call that must fail; each has a code and says what to do."""
        headers = {"Authorization": f"Bearer {self.admin_token}"}
        given = {"data": io.BytesIO(body)} if isinstance(body, bytes) else {"json": body}
        async with (
            aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=30)) as http,
            http.request(method, URL(self.control_url + path, encoded=True), **given) as response,
        ):
            text = await response.text()
            assert response.status >= 400, f"{method} {path}: {response.status} {text}"
            assert response.content_type == "application/problem+json", text
            problem: dict[str, Any] = json.loads(text)
        assert problem["status"] == response.status
        assert problem["code"]
        assert problem["hint"]
        assert "Traceback" not in text
        return problem

    async def hook(self, body: dict[str, Any], *, hook_id: str = "msg_1", at: float | None = None) -> tuple[int, Any]:
        """The web app's session-create hook, signed as Standard Webhooks says."""
        secret = (self.state_dir / "hook.secrets").read_text().split()[-1].removeprefix("whsec_")
        stamp = str(int(at if at is not None else time.time()))
        text = json.dumps(body)
        signed = hmac.digest(base64.b64decode(secret), f"{hook_id}.{stamp}.{text}".encode(), hashlib.sha256)
        headers = {
            "webhook-id": hook_id,
            "webhook-timestamp": stamp,
            "webhook-signature": f"v1,{base64.b64encode(signed).decode()}",
            "content-type": "application/json",
        }
        async with (
            aiohttp.ClientSession() as http,
            http.post(f"{self.control_url}/v1/hooks/session", data=text, headers=headers) as response,
        ):
            return response.status, await response.json()

    async def metric(self, name: str) -> float:
        """The value of one sample of /metrics, labels included in ``name``."""
        text = str(await self.api("GET", "/metrics"))
        for line in text.splitlines():
            if line.startswith(name + " "):
                return float(line.rpartition(" ")[2])
        return 0.0

    async def session(self, user: str, agent: str = "demo", **extra: Any) -> dict[str, Any]:
        """A ready session."""
        answer: dict[str, Any] = await self.api(
            "POST", "/v1/sessions", {"user": user, "agent": agent, "wait": "ready"} | extra
        )
        return answer


@asynccontextmanager
async def running(
    directory: Path,
    driver: str,
    config: str = "",
    *,
    env: Mapping[str, str] | None = None,
    kind: type[BrokerProcess] = BrokerProcess,
) -> AsyncIterator[BrokerProcess]:
    """A broker that is stopped afterwards, its sandboxes removed."""
    broker = kind(directory, driver, config, env=env)
    try:
        await broker.start()
    except BaseException:
        await broker.kill()
        raise
    try:
        yield broker
    finally:
        try:
            await _clear(broker)
        except BaseException:
            await broker.kill()
            raise
    for name in ("slots", "homes"):
        left = os.listdir(broker.state_dir / name)
        assert not left, f"{name} that nobody owns any more: {left}\n{broker.log_tail()}"


async def _clear(broker: BrokerProcess) -> None:
    """Erases its sessions, drains its pools and stops it."""
    assert broker.process is not None
    if broker.process.returncode is not None:
        await broker.start()
    while views := (await broker.api("GET", "/v1/sessions?limit=100"))["sessions"]:
        paths = [f"/v1/sessions/{view['user']}/{view['workspace']}" for view in views]
        await asyncio.gather(*(broker.api("DELETE", path) for path in paths))
    if "[pool.agents" in broker.config_path.read_text():
        await broker.drain_pool()
    await broker.stop()


async def start_fails(broker: BrokerProcess) -> tuple[int, str]:
    """Exit status and log of a broker that cannot start."""
    process = await broker.spawn()
    try:
        async with asyncio.timeout(15):
            status = await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
        raise AssertionError(f"it hangs\n{broker.log_tail()}") from None
    assert status not in (0, -9), broker.log_tail()
    assert "Traceback" not in broker.log_tail()
    return status, broker.log_tail()


class Client:
    """Collects what an editor would show. ``permission`` picks an option's kind."""

    def __init__(self, permission: str = "allow_once") -> None:
        self.updates: list[Any] = []
        self.permissions: list[Any] = []
        self.notifications: list[tuple[str, Any]] = []
        self.permission = permission
        self.held: asyncio.Event | None = None
        """Given: permission requests are not answered before it is set."""
        self._news = asyncio.Event()

    async def session_update(self, session_id: str, update: Any, **kwargs: Any) -> None:
        self.updates.append(update)
        self._news.set()

    async def request_permission(self, *args: Any, **kwargs: Any) -> Any:
        options = kwargs.get("options") or next(arg for arg in args if isinstance(arg, list))
        self.permissions.append(options)
        self._news.set()
        if self.held is not None:
            await self.held.wait()
        chosen = next((option for option in options if option.kind == self.permission), options[0])
        return acp.RequestPermissionResponse(
            outcome=acp.schema.AllowedOutcome(outcome="selected", option_id=chosen.option_id)
        )

    async def ext_method(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        raise acp.RequestError.method_not_found(method)

    def on_connect(self, conn: Any) -> None:
        return None

    async def ext_notification(self, method: str, params: dict[str, Any]) -> None:
        self.notifications.append((method, params))
        self._news.set()

    @property
    def text(self) -> str:
        """The agent's words so far."""
        parts = []
        for update in self.updates:
            if update.session_update == "agent_message_chunk" and update.content.type == "text":
                parts.append(update.content.text)
        return "".join(parts)

    async def until(self, what: Callable[[], bool], limit_s: float = 20.0) -> None:
        """Waits for news until ``what`` holds."""
        async with asyncio.timeout(limit_s):
            while not what():
                self._news.clear()
                await self._news.wait()


@asynccontextmanager
async def connected(url: str, token: str, client: Client) -> AsyncIterator[Any]:
    """An initialized connection of the PyPI package ``agent-client-protocol``."""
    stream = await create_websocket_stream(url, headers={"Authorization": f"Bearer {token}"})
    connection = acp.connect_to_agent(cast(acp.Client, client), stream)
    try:
        async with asyncio.timeout(30):
            await connection.initialize(protocol_version=acp.PROTOCOL_VERSION)
        yield connection
    finally:
        await connection.close()
        await stream.close()


async def turn(connection: Any, session_id: str, text: str, limit_s: float = 60.0) -> Any:
    """One prompt; returns its result."""
    async with asyncio.timeout(limit_s):
        return await connection.prompt(session_id=session_id, prompt=[acp.text_block(text)])
