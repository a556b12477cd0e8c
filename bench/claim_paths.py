"""Ways to a ready sandbox, each timed: a user's own warm one, a generic one, a cold start, and ``docker exec``."""

from __future__ import annotations

import asyncio
import base64
import hmac
import http.client
import io
import json
import tarfile
import time
import uuid
from collections.abc import Callable
from typing import Any

import aiodocker

from bench.bringup import Front
from tests.e2e.harness import IMAGE, BrokerProcess

FILES = 40
"""Files in a returning user's home."""


class Api:
    """The control API over one kept connection; blocks."""

    def __init__(self, broker: BrokerProcess) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", broker.control_port, timeout=150)
        secret = (broker.state_dir / "hook.secrets").read_text().split()[-1]
        self._secret = base64.b64decode(secret.removeprefix("whsec_"))
        self._headers = {"Authorization": f"Bearer {broker.admin_token}", "Content-Type": "application/json"}

    def __call__(self, method: str, path: str, body: Any = None) -> Any:
        """The JSON of the answer. Raises ``RuntimeError`` for an error."""
        self._connection.request(method, path, json.dumps(body) if body is not None else None, self._headers)
        response = self._connection.getresponse()
        text = response.read()
        if response.status >= 400:
            raise RuntimeError(f"{method} {path}: {response.status} {text.decode()}")
        return json.loads(text) if text else None

    def metric(self, name: str) -> float:
        """One sample of /metrics, labels included in ``name``."""
        self._connection.request("GET", "/metrics", headers=self._headers)
        text = self._connection.getresponse().read().decode()
        lines = (line for line in text.splitlines() if line.startswith(f"{name} "))
        return float(next(lines, "0").rpartition(" ")[2])

    def hook(self, user: str, agent: str) -> dict[str, Any]:
        """The web app's session-create hook, signed (Standard Webhooks)."""
        name, stamp = f"msg_{uuid.uuid4().hex}", str(int(time.time()))
        text = json.dumps({"user": user, "agent": agent})
        signed = hmac.digest(self._secret, f"{name}.{stamp}.{text}".encode(), "sha256")
        headers = {
            "webhook-id": name,
            "webhook-timestamp": stamp,
            "webhook-signature": f"v1,{base64.b64encode(signed).decode()}",
            "Content-Type": "application/json",
        }
        self._connection.request("POST", "/v1/hooks/session", text, headers)
        response = self._connection.getresponse()
        told: dict[str, Any] = json.loads(response.read())
        if response.status >= 400:
            raise RuntimeError(f"hook for {user}: {told}")
        return told

    def close(self) -> None:
        self._connection.close()


def until(reached: Callable[[], Any], limit_s: float = 90.0) -> Any:
    """Asks again and again; outside of anything that is timed."""
    end = time.monotonic() + limit_s
    while not (found := reached()):
        if time.monotonic() > end:
            raise TimeoutError(f"not reached within {limit_s:g} s")
        time.sleep(0.02)
    return found


def request(api: Api, user: str, agent: str, expected: str) -> tuple[float, dict[str, Any]]:
    """Seconds from the request for a session until the answer that it is ready. Raises when it came another way."""
    begin = time.perf_counter()
    made: dict[str, Any] = api("POST", "/v1/sessions", {"user": user, "agent": agent, "wait": "ready"})
    took = time.perf_counter() - begin
    path = api("GET", f"/v1/sessions/{user}/main/timeline")["bringups"][0]["path"]
    if path != expected:
        raise RuntimeError(f"{user} came by {path}, not {expected}")
    return took, made


def first_frame(made: dict[str, Any], text: str = "hello") -> float:
    """Seconds from the prompt to the first words, in a conversation that is opened for it."""
    client = Front(made["acp_url"], made["token"])
    try:
        return client.prompt(client.new(), text)
    finally:
        client.close()


def first_token(api: Api, user: str, agent: str, text: str) -> tuple[float, str]:
    """Seconds from the hook, through connecting and opening a conversation, to the first words; and the way it came."""
    begin = time.perf_counter()
    made = api.hook(user, agent)
    client = Front(made["acp_url"], made["token"])
    try:
        session = client.new()
        asked = time.perf_counter()
        took = asked - begin + client.prompt(session, text)
    finally:
        client.close()
    return took, str(api("GET", f"/v1/sessions/{user}/main/timeline")["bringups"][0]["path"])


def ready_by(api: Api, user: str) -> float:
    """Seconds that the last bring-up took in the broker, HTTP and token left out."""
    return float(api("GET", f"/v1/sessions/{user}/main/timeline")["bringups"][0]["total_ms"]) / 1000


def credential(api: Api, user: str, provider: str) -> None:
    """Gives the user a credential file."""
    value = {"token": "x" * 2000, "expires": 0}
    api("PUT", f"/v1/users/{user}/credentials/{provider}", {"kind": "file", "mode": "file", "value": value})


def view(api: Api, user: str) -> dict[str, Any]:
    """The session as operators see it."""
    found: dict[str, Any] = api("GET", f"/v1/sessions/{user}/main")
    return found


def settled(api: Api, user: str, state: str = "ready") -> bool:
    """Up in ``state``, its conversation opened ahead."""
    found = view(api, user)
    return found["state"] == state and found["sandbox"]["ahead"] in ("open", "failed", "")


def waiting(api: Api, agent: str, count: int, state: str = "hot") -> bool:
    """So many generic ones wait."""
    return api.metric(f'cortex_pool_size{{agent="{agent}",kind="generic",state="{state}"}}') >= count


class Exec:
    """The same work done by ``docker exec`` in a container that runs: home, settings and credentials in place, the
    agent started, its ``initialize`` answered. Through aiodocker, since the command line costs 20 ms more a call."""

    async def open(self) -> None:
        self._docker = aiodocker.Docker()

    async def prepare(self) -> None:
        """A fresh container that waits."""
        config: dict[str, Any] = {
            "Image": IMAGE,
            "Cmd": ["sleep", "120"],
            "HostConfig": {"NetworkMode": "none", "Tmpfs": {"/vol": "mode=777"}, "Init": True},
        }
        self._container = await self._docker.containers.create(config)
        await self._container.start()

    async def work(self) -> float:
        """Seconds."""
        begin = time.perf_counter()
        await self._run(["tar", "-x", "-C", "/vol"], home_tar(), answer=False)
        await self._run(["sh", "-c", "umask 077; cat > /vol/home/.credentials"], b"x" * 2000, answer=False)
        await self._run(["sh", "-c", "cat > /vol/home/.mcp.json"], b'{"mcpServers": {}}', answer=False)
        asked = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": {"protocolVersion": 1}}
        agent = ["python3", "-I", "-S", "/opt/cortex/sandbox_agent/demo.py"]
        await self._run(agent, json.dumps(asked).encode() + b"\n", answer=True)
        return time.perf_counter() - begin

    async def _run(self, command: list[str], given: bytes, *, answer: bool) -> None:
        run = await self._container.exec(command, stdin=True)
        async with asyncio.timeout(30), run.start(detach=False) as stream:
            await stream.write_in(given)
            if answer:
                await stream.read_out()
                return
            # A process's input ends when our way in is shut; aiodocker has no call for that.
            response: Any = stream._resp
            response.connection.transport.write_eof()
            while await stream.read_out() is not None:
                pass

    async def clear(self) -> None:
        """Removes the container."""
        await self._container.delete(force=True)

    async def close(self) -> None:
        await self._docker.close()


def home_tar() -> bytes:
    """A small home."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for number in range(FILES):
            member = tarfile.TarInfo(f"home/file{number}")
            member.size = 1000
            tar.addfile(member, io.BytesIO(b"x" * member.size))
    return made.getvalue()
