"""Sandboxes as containers of Docker Engine.

The end of a container is learned from the engine's event stream, one for all containers.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import structlog

from broker.config import DockerConfig
from broker.errors import Code, CortexError
from broker.host.tasks import TaskOwner
from broker.sandbox import accounts, docker_spec
from broker.sandbox.docker_engine import Engine
from broker.sandbox.docker_spec import LABEL
from broker.sandbox.driver import CREDENTIALS_DIR, Exit, Found, Liveness, SandboxSpec

log = structlog.get_logger(__name__)

DEFAULT_HOST = "unix:///var/run/docker.sock"
OPEN_TIMEOUT_S = 10.0
RETRY_S = 5.0
"""An engine that did not answer is asked again after so long, or when the event stream is back."""
PULL_TIMEOUT_S = 1800.0
TAIL_LINES, TAIL_BYTES = 64, 4096
IMAGE_UIDS = frozenset({64321, 1000})
"""Uids with a passwd entry in the image."""


class DockerDriver:
    """``installation`` names whose containers these are; ``node`` is told to operators in a label.

    ``entry``: argv of the agent server in the image. ``state_dir``: where small files that are mounted
    into sandboxes are kept; needed for a uid that the image does not know. ``ca_file``: PEM bundle
    that sandboxes trust.
    """

    name = "docker"
    isolated = True

    def __init__(
        self,
        config: DockerConfig,
        *,
        installation: str,
        node: str,
        tasks: TaskOwner,
        entry: Sequence[str] = docker_spec.ENTRY,
        state_dir: Path | None = None,
        ca_file: Path | None = None,
    ) -> None:
        self._config = config
        self._installation = installation
        self._node = node
        self._tasks = tasks
        self._entry = tuple(entry)
        self._state_dir = state_dir
        self._ca_file = ca_file
        self._label = f"{LABEL}installation={installation}"
        host = config.host or os.environ.get("DOCKER_HOST") or DEFAULT_HOST
        self._engine = Engine(host, timeout_s=config.call_timeout_s)
        self._pulling: asyncio.Task[None] | None = None
        self._follower: asyncio.Task[None] | None = None
        self._wakers: dict[str, set[asyncio.Event]] = {}

    async def open(self) -> None:
        info = await self._engine.info(timeout_s=min(OPEN_TIMEOUT_S, self._config.call_timeout_s))
        runtime = self._config.runtime
        if runtime and runtime not in info.get("Runtimes", {}):
            raise CortexError(
                Code.ENGINE_ERROR,
                f"the engine has no runtime {runtime!r}",
                hint="Register it in /etc/docker/daemon.json, or change sandbox.docker.runtime.",
                details={"runtimes": sorted(info.get("Runtimes", {}))},
            )
        try:
            await self._image()
        except CortexError as error:
            if error.code is not Code.IMAGE_MISSING or not names_registry(self._config.image):
                raise
            log.warning("image_not_here_yet", image=self._config.image, hint="it is pulled once the broker runs")
        if self._follower is None:
            self._follower = self._tasks.start(self._follow(), "docker-events")

    async def close(self) -> None:
        if self._follower is not None:
            self._follower.cancel()
            with suppress(asyncio.CancelledError):
                await self._follower
            self._follower = None
        await self._engine.close()

    async def prepare_image(self) -> str:
        if not names_registry(self._config.image):
            return await self._image()
        found = await self._engine.image_id(self._config.image)
        if found is not None:
            return found
        if self._pulling is None:
            log.info("pulling_image", image=self._config.image)
            pull = self._engine.pull(self._config.image, timeout_s=PULL_TIMEOUT_S)
            self._pulling = self._tasks.start(pull, "docker-pull", on_error=lambda _: None)
            self._pulling.add_done_callback(self._pulled)
        await asyncio.shield(self._pulling)
        return await self._image()

    def _pulled(self, done: asyncio.Task[None]) -> None:
        self._pulling = None

    async def create(self, spec: SandboxSpec) -> str:
        name = docker_spec.container_name(self._installation, spec.slot, spec.incarnation)
        body = docker_spec.container_config(
            spec,
            self._config,
            image_id=await self._image(),
            labels=docker_spec.labels(spec, self._installation, self._node),
            entry=self._entry,
            files=self._files(spec),
        )
        creating = self._tasks.start(self._create(name, body), f"docker-create-{spec.slot}", on_error=lambda _: None)
        try:
            return await asyncio.shield(creating)
        except asyncio.CancelledError:
            # The engine goes on making it, so it can only be removed once it is there.
            self._tasks.start(self._undo(creating), f"docker-undo-{spec.slot}", on_error=_log_forgotten)
            raise

    async def _create(self, name: str, body: dict[str, Any]) -> str:
        try:
            ref = await self._engine.create(name, body)
            if ref is None:
                await self._forget(name)
                ref = await self._engine.create(name, body)
        except CortexError as error:
            if error.code is Code.ENGINE_TIMEOUT:
                self._tasks.start(self._forget(name), f"docker-forget-{name}", on_error=_log_forgotten)
            raise
        if ref is None:
            raise CortexError(
                Code.ENGINE_ERROR,
                f"the name {name} is taken by another container",
                hint=f"See whose it is: docker inspect {name}",
            )
        return ref

    async def _undo(self, creating: asyncio.Task[str]) -> None:
        await self.remove(await creating)

    async def _forget(self, name: str) -> None:
        """Removes a container of ours that was created but never started: perhaps one whose answer was lost."""
        data = await self._engine.show(name)
        if data is None:
            return
        ours = (data["Config"].get("Labels") or {}).get(f"{LABEL}installation") == self._installation
        if ours and data["State"]["Status"] == "created":
            await self.remove(data["Id"])

    async def start(self, ref: str) -> None:
        await self._engine.start(ref)

    async def pause(self, ref: str) -> None:
        await self._switch(ref, "paused", self._engine.pause)

    async def resume(self, ref: str) -> None:
        await self._switch(ref, "running", self._engine.unpause)

    async def _switch(self, ref: str, wanted: Liveness, action: Callable[[str], Awaitable[None]]) -> None:
        try:
            await action(ref)
        except CortexError as error:
            # The engine refuses to pause what is paused; for us that is success.
            if error.code is not Code.ENGINE_ERROR or await self.inspect(ref) != wanted:
                raise

    async def stop(self, ref: str, grace_s: float) -> None:
        await self._engine.stop(ref, math.ceil(grace_s))

    async def remove(self, ref: str) -> None:
        if await self._engine.delete(ref):
            return
        with self._waker(ref) as waker:
            try:
                async with asyncio.timeout(self._config.call_timeout_s):
                    while await self._engine.show(ref) is not None:
                        await _woken(waker)
            except TimeoutError as error:
                raise self._engine.timed_out("remove", self._config.call_timeout_s) from error

    async def wait(self, ref: str) -> Exit:
        with self._waker(ref) as waker:
            while True:
                try:
                    data = await self._engine.show(ref)
                except CortexError as error:
                    log.debug("sandbox_wait_retry", ref=ref[:12], error=str(error))
                    await _woken(waker)
                    continue
                if data is None:
                    return Exit(code=None)
                if docker_spec.liveness(data["State"]["Status"]) == "exited":
                    return await self._exit(ref, data["State"])
                await waker.wait()
                waker.clear()

    async def _exit(self, ref: str, state: dict[str, Any]) -> Exit:
        tail = ""
        with suppress(CortexError):
            tail = (await self._engine.logs(ref, TAIL_LINES)).encode()[-TAIL_BYTES:].decode(errors="replace")
        return Exit(code=state.get("ExitCode"), oom=bool(state.get("OOMKilled")), tail=tail or state.get("Error", ""))

    async def inspect(self, ref: str) -> Liveness:
        data = await self._engine.show(ref)
        return "gone" if data is None else docker_spec.liveness(data["State"]["Status"])

    def credentials_dir(self, slot: str, incarnation: int) -> str:
        return CREDENTIALS_DIR

    async def memory(self, ref: str) -> int:
        return await self._engine.memory(ref)

    async def list(self) -> list[Found]:
        found = []
        for row in await self._engine.list(self._label):
            slot, incarnation = row["Labels"].get(f"{LABEL}slot"), row["Labels"].get(f"{LABEL}incarnation", "")
            if slot and incarnation.isdigit():
                state, image = docker_spec.liveness(row["State"]), row["ImageID"]
                found.append(Found(row["Id"], slot, int(incarnation), state, image))
        return found

    async def _image(self) -> str:
        """The image's id now: a tag may be built anew while the broker runs."""
        name = self._config.image
        image = await self._engine.image_id(name)
        if image is None:
            hint = f"It may be on its way; if not: docker pull {name}."
            if not names_registry(name):
                hint = "Build it with `make image`, or name another in sandbox.docker.image."
            raise CortexError(Code.IMAGE_MISSING, f"the sandbox image {name} is not there", hint=hint)
        return image

    def _files(self, spec: SandboxSpec) -> dict[str, Path]:
        files: dict[str, Path] = {}
        if self._state_dir is not None and spec.uid not in IMAGE_UIDS:
            etc = accounts.write_etc(self._state_dir / "docker", spec.uid, spec.group)
            files |= {target: etc[target] for target in ("/etc/passwd", "/etc/group")}
        if self._ca_file is not None:
            files[docker_spec.CA_FILE] = self._ca_file
        return files

    @contextmanager
    def _waker(self, ref: str) -> Iterator[asyncio.Event]:
        """An event that is set when something may have happened to ``ref``."""
        waker = asyncio.Event()
        self._wakers.setdefault(ref, set()).add(waker)
        try:
            yield waker
        finally:
            self._wakers[ref].discard(waker)
            if not self._wakers[ref]:
                del self._wakers[ref]

    def _wake(self, ref: str) -> None:
        for waker in self._wakers.get(ref, ()):
            waker.set()

    def _wake_all(self) -> None:
        for ref in self._wakers:
            self._wake(ref)

    async def _follow(self) -> None:
        """Follows the engine's events as long as the driver is open, over restarts of the engine."""
        delay = 0.1
        while True:
            began = asyncio.get_running_loop().time()
            try:
                await self._engine.ended(self._label, self._wake_all, self._wake)
            except CortexError as error:
                log.warning("engine_events_lost", error=str(error), hint=error.hint)
            if asyncio.get_running_loop().time() - began > RETRY_S:
                delay = 0.1
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))
            delay = min(delay * 2, RETRY_S)


def names_registry(image: str) -> bool:
    """Whether an image's name says where it comes from, as docker reads it; ``cortex-sandbox`` is built here."""
    host, slash, _ = image.partition("/")
    return bool(slash) and ("." in host or ":" in host or host == "localhost")


async def _woken(waker: asyncio.Event) -> None:
    """Returns when ``waker`` is set, or after ``RETRY_S`` seconds at the latest."""
    with suppress(TimeoutError):
        async with asyncio.timeout(RETRY_S):
            await waker.wait()
    waker.clear()


def _log_forgotten(error: BaseException) -> None:
    log.warning("container_left_behind", error=str(error), hint="It is removed when the broker starts next.")
