"""The shipped nginx configuration, running: ports, paths and certificate are the test's, all else is as shipped."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.e2e.harness import ROOT, free_port
from tests.host import missing
from tests.integration.gateway.support import make_ca

SHIPPED = ROOT / "deploy" / "nginx" / "cortex.conf"
START_S = 10.0


@dataclass(frozen=True)
class Front:
    """``ca``: the PEM file that its certificate is trusted by, for localhost and 127.0.0.1."""

    port: int
    plain_port: int
    ca: Path
    directory: Path

    def log(self, name: str) -> str:
        return (self.directory / name).read_text()


def adapted(directory: Path, changes: Mapping[str, str]) -> str:
    """The shipped text with ``changes``, each of which has to be there, in an http block of its own."""
    text = SHIPPED.read_text()
    for old, new in changes.items():
        assert old in text, f"{SHIPPED.name} has no {old!r}"
        text = text.replace(old, new)
    temporary = "".join(
        f"{kind}_temp_path {directory}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = "user root;" if os.geteuid() == 0 else ""
    return (
        f"{user}daemon off;\nworker_processes 1;\npid {directory}/pid;\nerror_log {directory}/error.log warn;\n"
        f"events {{}}\nhttp {{\n{temporary}{text}}}\n"
    )


@asynccontextmanager
async def front(
    directory: Path, front_port: int, control_port: int, changes: Mapping[str, str] | None = None
) -> AsyncIterator[Front]:
    """nginx before a broker at these ports."""
    if shutil.which("nginx") is None:
        missing("nginx is not installed")
    port, plain_port = free_port(), free_port()
    make_ca(directory, "localhost", "127.0.0.1")
    text = adapted(
        directory,
        {
            "listen 443 ssl": f"listen 127.0.0.1:{port} ssl",
            "    listen [::]:443 ssl so_keepalive=on;\n": "",
            "listen 80;": f"listen 127.0.0.1:{plain_port};",
            "    listen [::]:80;\n": "",
            "127.0.0.1:8765": f"127.0.0.1:{front_port}",
            "127.0.0.1:8766": f"127.0.0.1:{control_port}",
            "/etc/nginx/cortex/fullchain.pem": f"{directory}/cert.pem",
            "/etc/nginx/cortex/privkey.pem": f"{directory}/key.pem",
            "/var/log/nginx/cortex.log": f"{directory}/access.log",
        }
        | dict(changes or {}),
    )
    config = directory / "nginx.conf"
    config.write_text(text)
    command = ["nginx", "-e", f"{directory}/error.log", "-p", str(directory), "-c", str(config)]
    checked = subprocess.run([*command, "-t"], capture_output=True, text=True, timeout=START_S)
    assert checked.returncode == 0, checked.stderr + (directory / "error.log").read_text()
    process = await asyncio.create_subprocess_exec(*command)
    try:
        await _listens(port)
        yield Front(port, plain_port, directory / "cert.pem", directory)
    finally:
        process.terminate()
        await asyncio.wait_for(process.wait(), START_S)


async def _listens(port: int) -> None:
    async with asyncio.timeout(START_S):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except ConnectionRefusedError:
                await asyncio.sleep(0.02)
                continue
            writer.close()
            return
