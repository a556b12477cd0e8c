"""Requests for embeddings that come close together are sent as one call, and each gets its part of the answer.

Together go requests that are equal but for ``input`` and are made in the same scope. An input that the provider
refuses fails its own request alone: after a refusal each request is sent as it came.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from broker.errors import CortexError
from broker.gateway.cache import Recorded, kept
from broker.gateway.coalesce import Audience
from broker.gateway.embeddings import MAX_BYTES, Asked, merged, read, split
from broker.gateway.heads import Headers
from broker.gateway.policy import Policy
from broker.host.tasks import TaskOwner

AT_ONCE = 8
"""Requests of a refused batch that are under way at a time."""
REFUSED = frozenset((400, 413, 422))
"""Statuses that are about what was asked; the others (credential, rate, server) hold for each."""
GOING = "the gateway is going away"
JSON = (b"content-type", b"application/json")
_RETRY = frozenset((b"retry-after", b"retry-after-ms", b"x-should-retry"))


class Answer(Protocol):
    """What came back."""

    @property
    def status(self) -> int: ...
    @property
    def headers(self) -> Headers: ...
    @property
    def body(self) -> bytes: ...


Send = Callable[[bytes], Awaitable[Answer]]


class Member:
    """A request that waits for its part. ``cancel``: nobody waits any more."""

    __slots__ = ("asked", "audience")

    def __init__(self, asked: Asked, audience: Audience) -> None:
        self.asked = asked
        self.audience: Audience | None = audience

    def cancel(self) -> None:
        self.audience = None

    def give(self, status: int, headers: Headers, body: bytes) -> None:
        """The answer, whole."""
        audience, self.audience = self.audience, None
        if audience is not None:
            answer = Recorded(status, b"", headers, [], False, len(body)).marked(b"batched")
            audience.shared_head(answer)
            if body:
                audience.shared_body([body])
            audience.shared_end()

    def lose(self, why: str) -> None:
        audience, self.audience = self.audience, None
        if audience is not None:
            audience.shared_lost(why)


@dataclass(slots=True, eq=False)
class _Batch:
    """One that still fills."""

    send: Send
    members: list[Member] = field(default_factory=list)
    inputs: int = 0
    size: int = 0
    timer: asyncio.TimerHandle | None = None


class Batcher:
    """One of a provider. ``send``: one call with a body, raises ``CortexError``."""

    def __init__(self, policy: Policy, send: Send | None, tasks: TaskOwner) -> None:
        self._wait_s = policy.batch_s
        self._max_inputs = policy.batch_size
        self._send = send
        self._tasks = tasks
        self._filling: dict[Hashable, _Batch] = {}
        self.batches = self.batched = self.refused = 0

    def add(self, body: bytes, audience: Audience, scope: Hashable = "", send: Send | None = None) -> Member | None:
        """None: it has to go alone. ``scope``: names the credential, the target and the headers; ``send``: how calls
        of this scope go out, where not as all do."""
        send = send or self._send
        asked = read(body, self._max_inputs) if self._wait_s and send is not None else None
        if asked is None or send is None:
            return None
        kind = (scope, asked.kind)
        batch = self._filling.get(kind)
        if batch is not None and (
            batch.inputs + len(asked.inputs) > self._max_inputs or batch.size + len(body) > MAX_BYTES
        ):
            self._dispatch(kind)
            batch = None
        if batch is None:
            batch = self._filling[kind] = _Batch(send)
            batch.timer = asyncio.get_running_loop().call_later(self._wait_s, self._dispatch, kind)
        member = Member(asked, audience)
        batch.members.append(member)
        batch.inputs += len(asked.inputs)
        batch.size += len(body)
        if batch.inputs == self._max_inputs:
            self._dispatch(kind)
        return member

    def _dispatch(self, kind: Hashable) -> None:
        batch = self._filling.pop(kind)
        if batch.timer is not None:
            batch.timer.cancel()
        members = [each for each in batch.members if each.audience is not None]
        if members:
            self._tasks.start(self._carry_out(batch.send, members), "batch")

    def close(self) -> None:
        """What still fills is not sent."""
        for batch in self._filling.values():
            if batch.timer is not None:
                batch.timer.cancel()
            for member in batch.members:
                member.lose(GOING)
        self._filling.clear()

    async def _carry_out(self, send: Send, members: list[Member]) -> None:
        try:
            if len(members) == 1 or not await self._together(send, members):
                left = iter(members)
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(AT_ONCE, len(members))):
                        group.create_task(_each_alone(send, left))
        finally:
            # Only where this was cancelled is anybody left.
            for member in members:
                member.lose(GOING)

    async def _together(self, send: Send, members: list[Member]) -> bool:
        """False: each has to be sent alone."""
        self.batches += 1
        self.batched += len(members)
        try:
            answer = await send(merged([each.asked for each in members]))
        except CortexError as error:
            for member in members:
                member.lose(error.what)
            return True
        if answer.status in REFUSED:
            self.refused += 1
            return False
        if answer.status != 200:
            for member in members:
                member.give(answer.status, _told(answer), answer.body)
            return True
        bodies = split(answer.body, [each.asked for each in members])
        if bodies is None:
            self.refused += 1
            return False
        for member, body in zip(members, bodies, strict=True):
            member.give(200, [JSON], body)
        return True


async def _each_alone(send: Send, left: Iterator[Member]) -> None:
    for member in left:
        if member.audience is None:
            continue
        try:
            answer = await send(member.asked.body)
        except CortexError as error:
            member.lose(error.what)
        else:
            member.give(answer.status, _told(answer), answer.body)


def _told(answer: Answer) -> Headers:
    if answer.status == 200:
        return kept(answer.headers)
    return kept(answer.headers) + [each for each in answer.headers if each[0].lower() in _RETRY]
