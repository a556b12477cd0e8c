"""Docker Engine, one method a call; the one module that imports aiodocker.

Every call is counted, bounded by a deadline, and raises only ``CortexError``. What is an ordinary
answer to the driver (no such container, name taken) is a return value instead.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import datetime
from typing import Any, TypeVar

import aiodocker
import aiohttp

from broker.errors import Code, CortexError
from broker.metrics import SANDBOX_CALLS, SANDBOX_ERRORS

T = TypeVar("T")

QUIET_S = 600.0
"""An event stream on which nothing came for so long is taken for half-open."""


class Engine:
    """``host``: unix:///path, tcp://host:port or ssh://host. ``timeout_s``: default deadline of a call."""

    def __init__(self, host: str, *, timeout_s: float) -> None:
        self.host = host
        self._timeout_s = timeout_s
        self._client: aiodocker.Docker | None = None

    async def close(self) -> None:
        """Ends what is under way; a later call connects again."""
        if self._client is not None:
            await self._client.close()
            self._client = None

    def _docker(self) -> aiodocker.Docker:
        if self._client is None:
            try:
                # No default timeout: ``_call`` bounds each call as a whole.
                self._client = aiodocker.Docker(self.host, timeout=aiohttp.ClientTimeout(total=None, sock_connect=10))
            except ValueError as error:
                raise CortexError(
                    Code.BAD_CONFIG,
                    f"{self.host!r} is no engine address",
                    cause=error,
                    hint="sandbox.docker.host (or DOCKER_HOST) is like unix:///var/run/docker.sock or tcp://host:2376.",
                ) from error
        return self._client

    async def _call(
        self, call: str, action: Callable[[aiodocker.Docker], Awaitable[T]], *, timeout_s: float | None = None
    ) -> T:
        timeout_s = timeout_s or self._timeout_s
        SANDBOX_CALLS.labels("docker", call).inc()
        try:
            async with asyncio.timeout(timeout_s):
                return await action(self._docker())
        except TimeoutError as error:
            SANDBOX_ERRORS.labels("docker", call).inc()
            raise self.timed_out(call, timeout_s) from error
        except (aiodocker.DockerError, aiohttp.ClientError, OSError) as error:
            SANDBOX_ERRORS.labels("docker", call).inc()
            raise self._mapped(call, error) from error
        except (ValueError, TypeError, LookupError) as error:
            SANDBOX_ERRORS.labels("docker", call).inc()
            raise self._rubbish(call, error) from error

    def _rubbish(self, call: str, error: Exception) -> CortexError:
        return CortexError(
            Code.ENGINE_ERROR,
            f"what listens at {self.host} does not answer {call} as Docker Engine does",
            cause=error,
            hint="Correct sandbox.docker.host (or DOCKER_HOST), or update the engine: 20.10 or later.",
        )

    def timed_out(self, call: str, timeout_s: float) -> CortexError:
        """The error of a call that had no answer in ``timeout_s`` seconds."""
        return CortexError(
            Code.ENGINE_TIMEOUT,
            f"Docker Engine at {self.host} did not answer {call} within {timeout_s:g} s",
            hint="See whether it hangs: `docker version`, the engine's log; then restart it.",
        )

    def _mapped(self, call: str, error: Exception) -> CortexError:
        status = getattr(error, "status", 900)
        message = str(getattr(error, "message", error))
        if not isinstance(error, aiodocker.DockerError) or status == 900:
            hint = f"Start Docker Engine (systemctl start docker), or correct sandbox.docker.host ({self.host})."
            if "Permission denied" in message:
                hint = "Let the broker's user use the engine: usermod -aG docker USER, then log in again."
            return CortexError(
                Code.ENGINE_DOWN, f"Docker Engine at {self.host} cannot be reached", cause=message, hint=hint
            )
        if status == 404 and call == "create":
            return CortexError(
                Code.IMAGE_MISSING, "the sandbox image is gone", cause=message, hint="Build it again with `make image`."
            )
        if status == 404:
            return CortexError(
                Code.SANDBOX_DIED,
                f"the engine cannot {call} a container that is gone",
                cause=message,
                hint="Start the session again; it gets a new sandbox.",
            )
        if "no space left" in message:
            return CortexError(
                Code.DISK_FULL, f"the engine cannot {call}", cause=message, hint="Make room: docker system df."
            )
        return CortexError(
            Code.ENGINE_ERROR,
            f"the engine refused to {call}",
            cause=message,
            hint="The cause is the engine's own words; `make image` mends an outdated image.",
            details={"status": status},
        )

    async def info(self, *, timeout_s: float | None = None) -> dict[str, Any]:
        """``GET /info``."""
        return dict(await self._call("info", lambda docker: docker.system.info(), timeout_s=timeout_s))

    async def image_id(self, name: str) -> str | None:
        """The id behind a tag, None when there is no such image."""
        data = await self._call("image", lambda docker: _or_none(docker.images.inspect(name)))
        return None if data is None else str(data["Id"])

    async def pull(self, name: str, *, timeout_s: float) -> None:
        """Has the engine fetch an image. Raises ``IMAGE_MISSING`` when the registry does not give it."""
        try:
            await self._call("pull", lambda docker: docker.images.pull(name, timeout=None), timeout_s=timeout_s)
        except CortexError as error:
            if error.code in (Code.ENGINE_DOWN, Code.ENGINE_TIMEOUT, Code.DISK_FULL):
                raise
            raise CortexError(
                Code.IMAGE_MISSING,
                f"the sandbox image {name} is not there, and cannot be pulled",
                cause=error.cause,
                hint=f"See what the registry says: docker pull {name}. Log in there, or correct sandbox.docker.image.",
            ) from error

    async def memory(self, ref: str) -> int:
        """What its processes take: all of its cgroup but cached files that are easily given up."""

        async def get(docker: aiodocker.Docker) -> int:
            (sample,) = await docker.containers.container(ref).stats(stream=False)
            used = sample.get("memory_stats") or {}
            detail = used.get("stats") or {}
            cached = detail.get("inactive_file", detail.get("total_inactive_file", 0))
            return max(0, int(used.get("usage", 0)) - int(cached))

        return await self._call("stats", get)

    async def create(self, name: str, body: dict[str, Any]) -> str | None:
        """The new container's id, None when the name is taken."""

        async def post(docker: aiodocker.Docker) -> str | None:
            container = await _or_none(docker.containers.create(body, name=name), status=409)
            return None if container is None else str(container.id)

        return await self._call("create", post)

    async def start(self, ref: str) -> None:
        """Starts it; no error when it runs."""
        await self._call("start", lambda docker: docker.containers.container(ref).start())

    async def pause(self, ref: str) -> None:
        """Freezes it; an error when it is frozen."""
        await self._call("pause", lambda docker: docker.containers.container(ref).pause())

    async def unpause(self, ref: str) -> None:
        """Thaws it; an error when it is not frozen."""
        await self._call("unpause", lambda docker: docker.containers.container(ref).unpause())

    async def stop(self, ref: str, grace_s: int) -> None:
        """SIGTERM, after ``grace_s`` SIGKILL; no error when it is gone."""
        await self._call(
            "stop",
            lambda docker: _or_none(docker.containers.container(ref).stop(t=grace_s)),
            timeout_s=grace_s + self._timeout_s,
        )

    async def delete(self, ref: str) -> bool:
        """Kills and removes it. False: somebody else is removing it just now."""

        async def delete(docker: aiodocker.Docker) -> bool:
            try:
                await docker.containers.container(ref).delete(force=True, v=True)
            except aiodocker.DockerError as error:
                if error.status not in (404, 409):
                    raise
                return error.status == 404
            return True

        return await self._call("remove", delete)

    async def show(self, ref: str) -> dict[str, Any] | None:
        """``GET /containers/REF/json``, None when it is gone."""
        return await self._call("inspect", lambda docker: _or_none(docker.containers.container(ref).show()))

    async def list(self, label: str) -> list[dict[str, Any]]:
        """Id, ImageID, Labels and State of the containers in every state that carry ``label`` (``key=value``)."""
        filters = json.dumps({"label": [label]})

        async def get(docker: aiodocker.Docker) -> list[dict[str, Any]]:
            rows = await docker.containers.list(all=True, filters=filters)
            return [{key: row[key] for key in ("Id", "ImageID", "Labels", "State")} for row in rows]

        return await self._call("list", get)

    async def logs(self, ref: str, lines: int) -> str:
        """The last ``lines`` lines that it printed."""

        async def get(docker: aiodocker.Docker) -> str:
            return "".join(await docker.containers.container(ref).log(stdout=True, stderr=True, tail=lines))

        return await self._call("logs", get)

    async def ended(self, label: str, on_connect: Callable[[], None], on_end: Callable[[str], None]) -> None:
        """Follows the deaths and removals of containers with ``label`` until the stream ends.

        ``on_connect`` is called when nothing from then on can be missed, ``on_end`` with the id of each
        container that ended. Raises ``CortexError`` when the engine cannot be reached.
        """
        # The engine's own clock: its buffer replays what happened between this call and the stream.
        info = await self.info()
        try:
            since = datetime.fromisoformat(info["SystemTime"]).timestamp()
        except (ValueError, TypeError, KeyError) as error:
            raise self._rubbish("info", error) from error
        docker = self._docker()
        filters = json.dumps({"type": ["container"], "event": ["die", "destroy"], "label": [label]})
        quiet: Any = aiohttp.ClientTimeout(sock_read=QUIET_S)
        subscriber = docker.events.subscribe(create_task=False)  # type: ignore[no-untyped-call]
        stream = asyncio.gather(
            docker.events.run(since=f"{since:.6f}", filters=filters, timeout=quiet),
            self._drain(subscriber.get, on_end),
        )
        SANDBOX_CALLS.labels("docker", "events").inc()
        on_connect()
        try:
            await stream
        except (aiodocker.DockerError, aiohttp.ClientError, OSError, ValueError) as error:
            raise self._mapped("events", error) from error
        finally:
            if not stream.done():
                stream.cancel()
                with suppress(asyncio.CancelledError):
                    await stream

    @staticmethod
    async def _drain(get: Callable[[], Awaitable[dict[str, Any] | None]], on_end: Callable[[str], None]) -> None:
        while (event := await get()) is not None:
            on_end(str(event.get("Actor", {}).get("ID", "")))


async def _or_none(request: Awaitable[T], *, status: int = 404) -> T | None:
    """The answer, or None when the engine says ``status``."""
    try:
        return await request
    except aiodocker.DockerError as error:
        if error.status != status:
            raise
        return None
