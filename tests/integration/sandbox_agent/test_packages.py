"""Package builds with the real npm and pip, from a registry on loopback."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from sandbox_agent import packages
from sandbox_agent.spawn import Surroundings
from sandbox_agent.wire.messages import Build

needs_npm = pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
NODE_PROGRAM = b"#!/usr/bin/env node\nconsole.log('built ' + process.argv[2])\n"


def npm_tarball(manifest: dict[str, Any]) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as archive:
        for name, content in (("package.json", json.dumps(manifest).encode()), ("cli.js", NODE_PROGRAM)):
            info = tarfile.TarInfo(f"package/{name}")
            info.size, info.mode = len(content), 0o644
            archive.addfile(info, io.BytesIO(content))
    return data.getvalue()


def wheel() -> bytes:
    files = {
        "some_mcp/__init__.py": "import sys\ndef main():\n    print('built', sys.argv[1])\n    return 0\n",
        "some_mcp-2.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: some-mcp\nVersion: 2.0\n",
        "some_mcp-2.0.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "some_mcp-2.0.dist-info/entry_points.txt": "[console_scripts]\nsome-mcp = some_mcp:main\n",
    }
    record = "".join(f"{name},,\n" for name in files) + "some_mcp-2.0.dist-info/RECORD,,\n"
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, text in (files | {"some_mcp-2.0.dist-info/RECORD": record}).items():
            archive.writestr(name, text)
    return data.getvalue()


class Registry(ThreadingHTTPServer):
    """npm's and PyPI's protocol, as far as an install needs them."""

    daemon_threads = True
    hang = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        manifest = {
            "name": "@some/mcp",
            "version": "1.2.3",
            "bin": {"some-mcp": "cli.js"},
            "scripts": {"postinstall": "touch ../../../ran-a-script"},
        }
        tarball = npm_tarball(manifest)
        digest = base64.b64encode(hashlib.sha512(tarball).digest()).decode()
        dist = {"tarball": f"{self.url}/mcp.tgz", "integrity": f"sha512-{digest}"}
        version = manifest | {"dist": dist, "hasInstallScript": True}
        document = {"name": "@some/mcp", "dist-tags": {"latest": "1.2.3"}, "versions": {"1.2.3": version}}
        self.pages = {
            "/@some%2fmcp": ("application/json", json.dumps(document).encode()),
            "/mcp.tgz": ("application/octet-stream", tarball),
            "/some-mcp/": ("text/html", b'<a href="/some_mcp-2.0-py3-none-any.whl">some_mcp-2.0-py3-none-any.whl</a>'),
            "/some_mcp-2.0-py3-none-any.whl": ("application/zip", wheel()),
        }


class Handler(BaseHTTPRequestHandler):
    server: Registry

    def do_GET(self) -> None:
        while self.server.hang:
            threading.Event().wait(0.05)
        kind, body = self.server.pages.get(self.path, ("text/plain", b""))
        self.send_response(200 if body else 404)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        return


@pytest.fixture
def registry() -> Iterator[Registry]:
    server = Registry()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.hang = False
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def surroundings(tmp_path: Path) -> Surroundings:
    """Nothing listens on the proxy's port: only loopback is reached, directly."""
    return Surroundings(home=str(tmp_path), gateway_port=1, egress_port=1, python=sys.executable, package="/x")


@needs_npm
async def test_npm_without_install_scripts(registry: Registry, surroundings: Surroundings, tmp_path: Path) -> None:
    request = Build(7, "npm", "@some/mcp@1.2.3", registry=registry.url)
    built = await packages.build(request, surroundings)
    assert built.ok, built.what
    assert (built.id, built.version) == (7, "1.2.3")
    assert built.integrity.startswith("sha256-")
    published = tmp_path / "published"
    (tmp_path / "build").rename(published)
    done = subprocess.run([published / built.bins["some-mcp"], "it"], capture_output=True, check=True, timeout=20)
    assert done.stdout == b"built it\n"
    assert not list(tmp_path.rglob("ran-a-script"))
    again = await packages.build(request, surroundings)
    assert again.integrity == built.integrity


@needs_npm
async def test_a_package_that_is_not_there_leaves_nothing(
    registry: Registry, surroundings: Surroundings, tmp_path: Path
) -> None:
    built = await packages.build(Build(1, "npm", "no-such-mcp", registry=registry.url), surroundings)
    assert not built.ok
    assert "404" in built.what
    assert len(built.what) <= packages.MAX_TAIL
    assert not (tmp_path / "build").exists()


@needs_npm
async def test_an_install_that_hangs_is_ended(registry: Registry, surroundings: Surroundings, tmp_path: Path) -> None:
    registry.hang = True
    built = await packages.build(Build(1, "npm", "@some/mcp", registry=registry.url, timeout_s=1.0), surroundings)
    assert not built.ok
    assert "took over 1 s" in built.what
    assert not (tmp_path / "build").exists()
    mine = str(tmp_path).encode()
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            assert mine not in place.read_bytes()
        except OSError:
            continue


async def test_pypi(registry: Registry, surroundings: Surroundings, tmp_path: Path) -> None:
    built = await packages.build(Build(3, "pypi", "some-mcp==2.0", registry=registry.url), surroundings)
    assert built.ok, built.what
    assert built.version == "2.0"
    published = tmp_path / "published"
    (tmp_path / "build").rename(published)
    done = subprocess.run(
        [published / built.bins["some-mcp"], "it"],
        capture_output=True,
        check=True,
        timeout=20,
        env={"PATH": os.environ["PATH"]},
    )
    assert done.stdout == b"built it\n"
    assert b"/build/" not in (published / built.bins["some-mcp"]).read_bytes()


BAD = [
    "--global",
    "-g",
    "git+https://example.org/x",
    "../x",
    "/tmp/x",
    "https://example.org/x.tgz",
    "a b",
    "",
    "x@file:../y",
]


@pytest.mark.parametrize("ecosystem", ["npm", "pypi", "cargo"])
@pytest.mark.parametrize("package", BAD)
async def test_only_names_in_a_registry(surroundings: Surroundings, ecosystem: str, package: str) -> None:
    async with asyncio.timeout(5):
        built = await packages.build(Build(1, ecosystem, package, registry="http://127.0.0.1:1"), surroundings)
    assert not built.ok
    assert "registry" in built.what or "index" in built.what or "ecosystem" in built.what
