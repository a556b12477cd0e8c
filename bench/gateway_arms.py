"""The gateways that are compared, each running before the same stand-in provider."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop

from bench import lib
from bench.peers import gateway_configs as configs
from bench.peers import http_load as load

PEERS = Path(__file__).parent / "peers"
LITELLM = PEERS / ".litellm" / "bin" / "litellm"
PORTKEY = PEERS / ".portkey" / "node_modules" / "@portkey-ai" / "gateway" / "build" / "start-server.js"
CHAT = "/v1/chat/completions"
ALONE = "cortex, gateway alone"
"""Without the forwarder, which is inside the sandbox."""
SLOW_START_S = 90.0
Start = Callable[[contextlib.ExitStack, str, int], "Arm | None"]
STOP_S = 10.0


@dataclass
class Arm:
    """A way to the provider. ``ports``: one a sandbox, where it is ours. ``share``: of the calls, as it is slow."""

    ports: tuple[load.Where, ...]
    pids: tuple[int, ...] = ()
    target: str = CHAT
    headers: Mapping[str, str] = field(default_factory=dict)
    share: float = 1.0
    streams: bool = True
    sockets: tuple[str, ...] = ()
    """Of a gateway of ours: those behind the forwarders."""

    @property
    def port(self) -> load.Where:
        return self.ports[0]

    def request(self, size: int, **options: Any) -> bytes:
        """A call with a body of so many bytes; see ``http_load.body``."""
        return load.post(self.target, self.headers, load.body(size, **options))

    @property
    def memory_mb(self) -> float:
        """Proportional memory of its processes."""
        return sum(lib.pss_bytes(pid) for pid in self.pids) / 1e6


def tree(pid: int) -> tuple[int, ...]:
    """A process and all below it."""
    return (pid, *(each for child in lib.children_of(pid) for each in tree(child)))


@contextlib.contextmanager
def provider(port: int) -> Iterator[subprocess.Popen[bytes]]:
    """The stand-in provider."""
    with lib.child(lib.python("bench.peers.provider", str(port))) as process:
        yield process


@contextlib.contextmanager
def cortex(directory: str, gateway: Mapping[str, Any], *, slots: int = 1, users: int = 1) -> Iterator[Arm]:
    """Ours: the gateway process and a forwarder a sandbox. ``gateway``: a [gateway] section with provider ``bench``."""
    place = Path(directory, f"cx{secrets.token_hex(3)}")
    place.mkdir()
    spec = place / "spec.json"
    spec.write_text(json.dumps({"directory": str(place), "gateway": gateway, "slots": slots, "users": users}))
    ports = tuple(lib.free_ports(slots))
    pairs = [f"{place / str(number) / 'gateway'}:{port}" for number, port in enumerate(ports)]
    command = lib.python("bench.peers.cortex_gateway", str(spec))
    with lib.child(logged(command, place / "log")) as driver:
        try:
            with lib.child(lib.python("bench.peers.forwarders", *pairs)) as forwarders:
                pids = (*lib.children_of(driver.pid), forwarders.pid)
                sockets = tuple(pair.rpartition(":")[0] for pair in pairs)
                yield Arm(ports, pids, f"/bench{CHAT}", sockets=sockets)
        finally:
            driver.terminate()
            driver.wait(STOP_S)


def section(directory: str, upstreams: list[int], **policy: Any) -> dict[str, Any]:
    """A [gateway] section: provider ``bench`` at these ports, with an operator's key."""
    key = Path(directory, "key")
    key.write_text(configs.KEY)
    urls = [f"http://127.0.0.1:{port}" for port in upstreams]
    return {"providers": {"bench": {"kind": "openai", "upstreams": urls, "credential_file": str(key), **policy}}}


@contextlib.contextmanager
def arms(directory: str, notes: list[str]) -> Iterator[dict[str, Arm]]:
    """The provider itself (direct) and every gateway that is installed; ``notes`` says which are left out, and why."""
    far = lib.free_port()
    with contextlib.ExitStack() as stack:
        stack.enter_context(provider(far))
        ours = stack.enter_context(cortex(directory, section(directory, [far])))
        found = {"direct": Arm((far,)), "cortex": ours, ALONE: Arm(ours.sockets, ours.pids[:1], ours.target)}
        for name, start in (("nginx", nginx), ("haproxy", haproxy), ("litellm", _litellm), ("portkey", _portkey)):
            try:
                arm = _started(start, stack, directory, far)
            except RuntimeError as error:
                notes.append(f"{name} is left out: its process {str(error).rpartition('] ')[2]}")
                continue
            if arm is None:
                notes.append(f"{name} is left out: not installed; run bench/peers/install")
            else:
                found[name] = arm
        for name in [*found]:
            _probe(found, name, notes)
        yield found


def _started(start: Start, stack: contextlib.ExitStack, directory: str, far: int) -> Arm | None:
    """Tried twice: somebody else may have taken the port that was free."""
    try:
        return start(stack, directory, far)
    except RuntimeError:
        return start(stack, directory, far)


def _probe(found: dict[str, Arm], name: str, notes: list[str]) -> None:
    """Takes out what does not answer."""
    arm = found[name]
    whole = uvloop.run(load.calls(arm.port, arm.request(700), 1))
    streamed = uvloop.run(load.calls(arm.port, arm.request(700, stream=True), 1))
    if whole.errors:
        notes.append(f"{name} is left out: it answers {sorted(whole.statuses)}")
        del found[name]
    elif streamed.errors:
        notes.append(f"{name} does not stream: it answers {sorted(streamed.statuses)} (0: no token, or no answer)")
        arm.streams = False


def nginx(stack: contextlib.ExitStack, directory: str, far: int) -> Arm | None:
    """None: not installed; the others too."""
    if not shutil.which("nginx"):
        return None
    port, config = lib.free_port(), Path(directory, "nginx.conf")
    config.write_text(configs.nginx(port, far, directory))
    argv = ["nginx", "-p", directory, "-c", str(config)]
    process = stack.enter_context(lib.child(argv, waits=lib.accepts(port)))
    return Arm((port,), tree(process.pid))


def haproxy(stack: contextlib.ExitStack, directory: str, far: int) -> Arm | None:
    if not shutil.which("haproxy"):
        return None
    port, config = lib.free_port(), Path(directory, "haproxy.cfg")
    config.write_text(configs.haproxy(port, far))
    process = stack.enter_context(lib.child(["haproxy", "-db", "-f", str(config)], waits=lib.accepts(port)))
    return Arm((port,), tree(process.pid))


def _litellm(stack: contextlib.ExitStack, directory: str, far: int) -> Arm | None:
    """One worker, no database; its own table of prices, as it would fetch another at each start."""
    if not LITELLM.exists():
        return None
    port, config, key = lib.free_port(), Path(directory, "litellm.yaml"), f"sk-{secrets.token_hex(16)}"
    config.write_text(configs.litellm(far, key))
    env = ["env", "LITELLM_LOCAL_MODEL_COST_MAP=True", "LITELLM_LOG=ERROR"]
    argv = [*env, str(LITELLM), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
    argv += ["--num_workers", "1"]
    process = stack.enter_context(lib.child(quiet(argv), waits=lib.accepts(port), within=SLOW_START_S))
    return Arm((port,), tree(process.pid), headers={"authorization": f"Bearer {key}"}, share=0.04)


def _portkey(stack: contextlib.ExitStack, directory: str, far: int) -> Arm | None:
    """Takes the provider, and its key, from each request."""
    if not PORTKEY.exists() or not shutil.which("node"):
        return None
    port = lib.free_port()
    argv = ["env", "NODE_ENV=production", "node", str(PORTKEY), f"--port={port}", "--headless"]
    process = stack.enter_context(lib.child(quiet(argv), waits=lib.accepts(port), within=SLOW_START_S))
    headers = {
        "x-portkey-provider": "openai",
        "x-portkey-custom-host": f"http://127.0.0.1:{far}/v1",
        "authorization": f"Bearer {configs.KEY}",
    }
    return Arm((port,), tree(process.pid), headers=headers, share=0.1)


def logged(argv: list[str], log: Path) -> list[str]:
    """What it says on stderr goes to a file."""
    return ["sh", "-c", 'log=$1; shift; exec "$@" 2>"$log"', "sh", str(log), *argv]


def quiet(argv: list[str]) -> list[str]:
    """What it prints is thrown away: nobody reads it, and a full pipe would stop it."""
    return ["sh", "-c", 'exec "$@" >/dev/null 2>&1', "sh", *argv]


async def ask(port: int, what: str) -> int:
    """What a stand-in provider tells: ``count``, how many calls it has had, ``first``, when (monotonic ns)."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(b"GET /%s HTTP/1.1\r\nhost: x\r\n\r\n" % what.encode())
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), STOP_S)
        size = int(head.rpartition(b"content-length: ")[2].split()[0])
        return int(await reader.readexactly(size))
    finally:
        writer.close()
