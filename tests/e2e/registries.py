"""What package tools fetch from, on loopback behind TLS: a git server, a Python index, registries of npm, cargo, Maven.

The address is one that nothing inside takes for its own loopback, so tools ask the proxy for it.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import hashlib
import io
import json
import os
import subprocess
import tarfile
import zipfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from aiohttp import web

from tests.integration.gateway.support import make_ca

HOST = "127.0.0.2"
WHEEL = "tiny-1.0-py3-none-any.whl"
POM = "<project><artifactId>tiny</artifactId></project>"
PARENT = (
    "<project><modelVersion>4.0.0</modelVersion><groupId>org.tiny</groupId><artifactId>parent</artifactId>"
    "<version>1.0</version><packaging>pom</packaging></project>"
)
_GIT = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "init.defaultBranch=main")


class Registries:
    """``tls`` and ``plain``: ports of the same content. ``ca``: file with the certificate to trust."""

    def __init__(self, host: str, tls: int, plain: int, ca: Path) -> None:
        self.host = host
        self.tls = tls
        self.plain = plain
        self.ca = ca

    @property
    def url(self) -> str:
        return f"https://{self.host}:{self.tls}"


@asynccontextmanager
async def registries(directory: Path, host: str = HOST) -> AsyncIterator[Registries]:
    """They serve until the end."""
    directory.mkdir()
    # npm looks for this name where it asked a proxy for an address.
    context, pem = make_ca(directory, host, "localhost")
    ca = directory / "ca.pem"
    ca.write_text(pem)
    repository(directory)
    app = web.Application(client_max_size=2**24)
    app.router.add_route("*", "/git/{path:.*}", functools.partial(git, directory))
    app.router.add_get("/{path:.*}", content)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, 0, ssl_context=context).start()
        await web.TCPSite(runner, host, 0).start()
        tls, plain = (address[1] for address in runner.addresses)
        yield Registries(host, tls, plain, ca)
    finally:
        await runner.cleanup()


def repository(directory: Path) -> None:
    """A bare repository tiny.git with one file."""
    work = directory / "work"
    work.mkdir()
    (work / "README").write_text("a tiny repository\n")
    run = ["git", *_GIT, "-C", str(work)]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*run, *command], check=True, timeout=20)
    subprocess.run(["git", "clone", "-q", "--bare", str(work), str(directory / "tiny.git")], check=True, timeout=20)


async def git(directory: Path, request: web.Request) -> web.Response:
    """git's own smart HTTP server, called as CGI (RFC 3875)."""
    env = {
        "GIT_PROJECT_ROOT": str(directory),
        "GIT_HTTP_EXPORT_ALL": "1",
        "PATH_INFO": "/" + request.match_info["path"],
        "REQUEST_METHOD": request.method,
        "QUERY_STRING": request.query_string,
        "CONTENT_TYPE": request.headers.get("Content-Type", ""),
        "HTTP_CONTENT_ENCODING": request.headers.get("Content-Encoding", ""),
        "GIT_PROTOCOL": request.headers.get("Git-Protocol", ""),
        "PATH": os.environ["PATH"],
    }
    process = await asyncio.create_subprocess_exec(
        *("git", "http-backend"), env=env, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate(await request.read())
    head, _, body = out.partition(b"\r\n\r\n")
    headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n"))
    status = int(headers.pop("Status", "200").split()[0])
    return web.Response(status=status, body=body, headers=headers)


async def content(request: web.Request) -> web.Response:
    """What the registries answer to a GET."""
    base = f"{request.scheme}://{request.host}"
    found: dict[str, bytes | str] = {
        "/simple/tiny/": f'<a href="/files/{WHEEL}#sha256={hashlib.sha256(wheel()).hexdigest()}">{WHEEL}</a>',
        f"/files/{WHEEL}": wheel(),
        "/npm/tiny": packument(f"{base}/npm/tiny.tgz"),
        "/npm/tiny.tgz": tarball(),
        "/cargo/config.json": json.dumps({"dl": f"{base}/cargo/crates"}),
        "/cargo/ti/ny/tiny": json.dumps({"name": "tiny", "vers": "1.0.0"}),
        "/maven/org/tiny/tiny/1.0/tiny-1.0.pom": POM,
        "/maven/org/tiny/parent/1.0/parent-1.0.pom": PARENT,
    }
    body = found.get(request.path)
    if body is None:
        raise web.HTTPNotFound
    kind = "text/html" if request.path.startswith("/simple") else "application/octet-stream"
    return web.Response(body=body, content_type=kind)


def wheel() -> bytes:
    """A wheel with one module."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, text in {
            "tiny.py": "said = 'a tiny wheel'\n",
            "tiny-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n",
            "tiny-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            "tiny-1.0.dist-info/RECORD": "",
        }.items():
            archive.writestr(zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0)), text)
    return out.getvalue()


def tarball() -> bytes:
    """A package as npm packs it."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, text in {"package.json": '{"name":"tiny","version":"1.0.0"}', "said": "a tiny package\n"}.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    return out.getvalue()


def packument(address: str) -> str:
    """What npm's registry says of the package."""
    integrity = "sha512-" + base64.b64encode(hashlib.sha512(tarball()).digest()).decode()
    version = {"name": "tiny", "version": "1.0.0", "dist": {"tarball": address, "integrity": integrity}}
    return json.dumps({"name": "tiny", "dist-tags": {"latest": "1.0.0"}, "versions": {"1.0.0": version}})
