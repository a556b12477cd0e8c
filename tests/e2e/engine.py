"""A Docker Engine of the tests' own, which may be stopped, killed and held without hurting anybody."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.e2e.conftest import need_docker, short_directory
from tests.e2e.harness import IMAGE, ROOT
from tests.e2e.pools import docker
from tests.host import missing

START_S = 60.0
STOP_S = 60.0


class Engine:
    """``dockerd`` below ``directory``; ``image`` is loaded into it once."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.image = IMAGE
        self.address = f"unix://{directory}/d.sock"
        self.log = directory / "dockerd.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def config(self) -> str:
        """Settings of a broker that uses it."""
        return f'[sandbox.docker]\nhost = "{self.address}"\nimage = "{self.image}"\ncall_timeout_s = 3\n'

    async def start(self, *, live_restore: bool = False) -> None:
        """Returns when it answers. ``live_restore``: containers go on while it is down."""
        if self._process is not None and self._process.poll() is None:
            return
        (self.directory / "pid").unlink(missing_ok=True)
        data, run = self.directory / "data", self.directory / "exec"
        # In a network of its own: without a bridge it takes down docker0, whoever's that is.
        command = ["unshare", "--net", "dockerd", "--data-root", str(data), "--exec-root", str(run), "-H", self.address]
        command += ["--pidfile", str(self.directory / "pid"), "--bridge", "none", "--iptables=false"]
        command += ["--shutdown-timeout", "3", *(["--live-restore"] if live_restore else [])]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        async with asyncio.timeout(START_S):
            while subprocess.run(["docker", "-H", self.address, "version"], capture_output=True).returncode:
                assert self._process.poll() is None, self.log.read_text()[-2000:]
                await asyncio.sleep(0.1)

    async def stop(self) -> None:
        """SIGTERM: as an upgrade does it."""
        await self._ends(signal.SIGTERM)

    async def kill(self) -> None:
        """SIGKILL; its containerd dies with it, and no pid file may say otherwise."""
        await self._ends(signal.SIGKILL)
        (self.directory / "exec" / "containerd" / "containerd.pid").unlink()

    def hold(self) -> None:
        """It answers nobody from now on."""
        self._signal(signal.SIGSTOP)

    def release(self) -> None:
        """It goes on."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    async def _ends(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)
        async with asyncio.timeout(STOP_S):
            while self._process.poll() is None:
                await asyncio.sleep(0.02)

    def load(self) -> None:
        """Gives it an image: a small one of the same sources where that can be built."""
        small = f"cortex-engine-{os.getpid()}:test"
        build = ["docker", "build", "-q", "--target", "base", "-f", "Dockerfile.sandbox", "-t", small, "."]
        if subprocess.run(build, cwd=ROOT, capture_output=True, timeout=300).returncode == 0:
            self.image = small
        try:
            with subprocess.Popen(["docker", "save", self.image], stdout=subprocess.PIPE) as saving:
                load = ["docker", "-H", self.address, "load"]
                subprocess.run(load, stdin=saving.stdout, check=True, capture_output=True, timeout=300)
        finally:
            subprocess.run(["docker", "rmi", small], capture_output=True, timeout=60)

    def containers(self) -> list[str]:
        """Ids of all that it has."""
        return docker("ps", "-aq", "--no-trunc", host=self.address).split()

    async def end(self) -> None:
        """It and all that it runs."""
        await self.start()
        for ref in self.containers():
            docker("rm", "-f", ref, host=self.address)
        await self.stop()


@contextmanager
def directory() -> Iterator[Path]:
    """Where one may live; nothing of it stays mounted."""
    need_docker()
    if shutil.which("dockerd") is None or os.geteuid() != 0:
        missing("an engine of the tests' own needs dockerd and root")
    with short_directory() as place:
        try:
            yield place
        finally:
            mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
            for mount in reversed([one for one in mounts if one.startswith(f"{place}/")]):
                with suppress(OSError):
                    subprocess.run(["umount", "--lazy", mount], capture_output=True, timeout=20)
