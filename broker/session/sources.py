"""Where a user's configuration comes from: the store, a directory of TOML files, the web app.

Each source answers with raw sections by name; ``assembly`` reads them in parallel and keeps the
last good answer of one that fails.
"""

from __future__ import annotations

import asyncio
import json
import os
import stat
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

import aiohttp

from broker.config import Config
from broker.errors import Code, CortexError
from broker.session.sections import SECTIONS
from broker.store.users import UserStore

MAX_FILE = 256 * 2**10
"""Largest file of the directory and largest answer of the web app, in bytes."""


@dataclass(frozen=True)
class Answer:
    """``sections``: raw values by name. ``tag``: what a conditional request sends back (ETag)."""

    sections: Mapping[str, Any] = field(default_factory=dict)
    tag: str = ""


class Source(Protocol):
    """``name`` is a metric label."""

    name: str

    async def read(self, user: str, last: Answer | None) -> Answer:
        """What the source says of ``user``; ``last`` is its last good answer. Raises ``CortexError``."""


class StoreSource:
    """Sections that were PUT through the control API: one query."""

    name = "store"

    def __init__(self, users: UserStore) -> None:
        self._users = users

    async def read(self, user: str, last: Answer | None) -> Answer:
        return Answer(await self._users.sections(user))


class FilesSource:
    """``USER/SECTION.toml`` below a directory that operators keep; links are not followed."""

    name = "files"

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    async def read(self, user: str, last: Answer | None) -> Answer:
        return Answer(await asyncio.to_thread(self._read, user))

    def _read(self, user: str) -> dict[str, Any]:
        sections = {}
        directory = self._directory / user
        try:
            there = set(os.listdir(directory))
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except OSError as error:
            raise self._failed(directory / "*.toml", error) from error
        for section in SECTIONS:
            if f"{section}.toml" not in there:
                continue
            path = directory / f"{section}.toml"
            try:
                # Non-blocking, or a FIFO of that name would hold the thread for ever.
                fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                raise self._failed(path, error) from error
            try:
                with os.fdopen(fd, "rb") as file:
                    if not stat.S_ISREG(os.fstat(fd).st_mode):
                        raise self._failed(path, "no plain file")
                    text = file.read(MAX_FILE + 1)
                if len(text) > MAX_FILE:
                    raise self._failed(path, f"larger than {MAX_FILE} bytes")
                sections[section] = tomllib.loads(text.decode())
            except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
                raise self._failed(path, error) from error
        return sections

    def _failed(self, path: Path, cause: BaseException | str) -> CortexError:
        return CortexError(
            Code.BAD_SECTION,
            f"{path.parent.name}/{path.name} in the users directory cannot be read",
            cause=cause,
            hint="mend the file; until then the last good version of it is used",
        )


def touched(directory: Path, paths: Iterable[Path]) -> list[str]:
    """The users whom the changed ``paths`` below ``directory`` concern.

    A user's directory counts by itself: what was written into a new one before it was watched is
    never told of.
    """
    parts = [path.relative_to(directory).parts for path in paths]
    return sorted({found[0] for found in parts if len(found) == 1 or (len(found) == 2 and found[1].endswith(".toml"))})


class HttpSource:
    """``GET {config_url}/{user}`` in the web app: a JSON object of sections, ``If-None-Match`` honoured.

    404 means that the web app knows nothing of the user, which is an answer like any other.
    """

    name = "http"

    def __init__(self, config: Callable[[], Config]) -> None:
        self._config = config
        self._session: aiohttp.ClientSession | None = None

    async def read(self, user: str, last: Answer | None) -> Answer:
        settings = self._config().session
        if not settings.config_url:
            return Answer()
        if self._session is None:
            self._session = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=settings.config_timeout_s), raise_for_status=False
            )
        headers = {"Accept": "application/json"}
        if last is not None and last.tag:
            headers["If-None-Match"] = last.tag
        try:
            if settings.config_url_token_file:
                token = await asyncio.to_thread(Path(settings.config_url_token_file).read_text)
                headers["Authorization"] = f"Bearer {token.strip()}"
            async with self._session.get(
                f"{settings.config_url.rstrip('/')}/{quote(user, safe='')}",
                headers=headers,
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=settings.config_timeout_s),
            ) as response:
                return await self._answer(response, last)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError, RecursionError) as error:
            raise _http_failed(f"{type(error).__name__}: {error}") from error

    async def _answer(self, response: aiohttp.ClientResponse, last: Answer | None) -> Answer:
        if response.status == 304 and last is not None:
            return last
        if response.status == 404:
            return Answer()
        if response.status != 200:
            raise _http_failed(f"it answered {response.status}")
        body = bytearray()
        async for chunk in response.content.iter_any():
            body += chunk
            if len(body) > MAX_FILE:
                raise _http_failed(f"its answer is larger than {MAX_FILE} bytes")
        value = json.loads(body)
        if not isinstance(value, dict):
            raise _http_failed("its answer is not a JSON object of sections")
        return Answer(value, response.headers.get("ETag", ""))

    async def close(self) -> None:
        """Closes pooled connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None


def _http_failed(cause: str) -> CortexError:
    return CortexError(
        Code.BAD_SECTION,
        "the web app's configuration source did not answer",
        cause=cause,
        hint="check session.config_url; until it answers the last good configuration is used",
    )
