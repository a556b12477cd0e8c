"""What goes to clients: numbered, journaled, then emitted; each client in the order of seq.

A client that is up to date is written to directly. One whose answer is not on disk yet, that takes
no more bytes, or that asked for history, has a cursor and is fed from the journal until it has
caught up. So an answer never overtakes, is never overtaken, and nobody's slowness costs memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, NamedTuple

from sandbox_agent import jsonrpc, records
from sandbox_agent.clients import Client, Insert, frame
from sandbox_agent.conversations import Conversation
from sandbox_agent.journal import Journal, JournalFailed, JournalFull, JournalGone
from sandbox_agent.jsonrpc import Message
from sandbox_agent.records import Record

RETRY_S = 0.5
"""Pause between two tries to write to a full disk."""
MAX_HELD = 64 * 2**20
"""Bytes of agent output that wait for disk space; over that updates are dropped and counted."""
SLICE = 2
"""Chunks of the journal that one client is fed before others have a turn."""

FELL_BEHIND = "client.slow_consumer: the history it has not read is gone; connect and load again"


TOO_LARGE = jsonrpc.error(
    jsonrpc.SERVER_ERROR,
    "the agent's answer is larger than a message may be",
    slug="request.too_large",
    hint="ask for less at once",
)


class Item(NamedTuple):
    """A record on its way. ``to``: a conversation, one client, or None for everybody."""

    position: int
    seq: int
    kind: int
    frame: bytes
    to: Conversation | Client | None
    without: Client | None


class Outbox:
    """``on_full`` hears when the disk is full (True) and when it is not any more (False)."""

    def __init__(self, journal: Journal, *, on_full: Callable[[bool], None], limit: int) -> None:
        self.limit = limit
        self.clients: set[Client] = set()
        self.dropped = 0
        self._journal = journal
        self._on_full = on_full
        self._items: list[Item] = []
        self._behind: set[Client] = set()
        self._emitted = 0
        self._held_bytes = 0
        self._retry: asyncio.TimerHandle | None = None

    @property
    def full(self) -> bool:
        """Agent output waits for disk space."""
        return self._retry is not None

    # -- adding ----------------------------------------------------------------------------------

    def update(
        self,
        message: Message,
        to: Conversation | None,
        *,
        raw: bytes = b"",
        kind: int = records.UPDATE,
        without: Client | None = None,
    ) -> None:
        """A notification for the subscribers of ``to``, or for everybody. ``raw``: its text, to splice the stamp in."""
        if self.full and self._held_bytes > MAX_HELD:
            self.dropped += 1
            return
        seq, epoch = self._journal.take_seq(), self._journal.epoch
        body = jsonrpc.spliced(raw, message, epoch, seq) if raw else jsonrpc.stamped(message, epoch, seq)
        if len(body) > self.limit:
            self.dropped += 1
            return
        self._add(kind, seq, body, to, without)

    def request(self, message: Message, to: Conversation | None) -> tuple[int, bytes]:
        """An agent's request; returns the id that clients know it by, its seq, and its frame (empty: too large)."""
        seq = self._journal.take_seq()
        body = jsonrpc.stamped({**message, "id": seq}, self._journal.epoch, seq)
        if len(body) > self.limit:
            return seq, b""
        return seq, self._add(records.REQUEST, seq, body, to, None)

    def result(self, number: int, request_id: Any, outcome: Message, to: Conversation | None) -> None:
        """The answer to a client's request; goes out when it is on disk, if that client is still there."""
        client = next((c for c in self.clients if c.number == number), None)
        seq = self._journal.take_seq()
        body = jsonrpc.response(request_id, outcome, self._journal.epoch, seq)
        if len(body) > self.limit:
            body = jsonrpc.response(request_id, {"error": TOO_LARGE}, self._journal.epoch, seq)
        position = self._journal.append(
            records.RESULT, body, seq=seq, conversation=to.number if to else 0, target=number
        )
        self._held_bytes += len(body)
        self._items.append(Item(position, seq, records.RESULT, b"", client, None))

    def _add(self, kind: int, seq: int, body: bytes, to: Conversation | None, without: Client | None) -> bytes:
        flags, target = (records.EXCEPT, self.number(without)) if without is not None else (0, 0)
        position = self._journal.append(
            kind, body, seq=seq, conversation=to.number if to else 0, target=target, flags=flags
        )
        data = frame(body)
        self._held_bytes += len(data)
        self._items.append(Item(position, seq, kind, data, to, without))
        return data

    def note(self, kind: int, body: Message, conversation: Conversation | None = None) -> int:
        """A record that nobody gets; returns its seq."""
        seq = self._journal.take_seq()
        number = conversation.number if conversation else 0
        self._journal.append(kind, jsonrpc.dumps(body), seq=seq, conversation=number)
        return seq

    def number(self, client: Client) -> int:
        """The client's number, made known to the journal when it is first used."""
        if not client.introduced:
            client.introduced = True
            self.note(records.CLIENT, {"number": client.number, "key": client.attach.client})
        return client.number

    def answer(self, client: Client, request_id: Any, outcome: Message) -> None:
        """An answer of our own that is not journaled (it can be asked for again): in order with the rest."""
        self._direct(client, lambda seq: jsonrpc.response(request_id, outcome, self._journal.epoch, seq))

    def tell(self, client: Client, message: Message) -> None:
        """A notification of our own for one client, not journaled."""
        self._direct(client, lambda seq: jsonrpc.stamped(message, self._journal.epoch, seq))

    def _direct(self, client: Client, build: Callable[[int], bytes]) -> None:
        self.flush()
        if self.full or self._journal.failed:  # what is held has lower numbers; nothing may overtake it by number
            client.send(frame(build(self._emitted)))
            client.push()
            return
        data = frame(build(self._journal.take_seq()))
        self.flush()  # the journal may have marked the seq
        self.repeat(client, data)

    def insert(self, client: Client, insert: Insert) -> None:
        """Sends it when the client has come to where it belongs."""
        if client.closing:
            return
        client.inserts.append(insert)
        self._fall_behind(client, self._journal.written)  # what is held is yet to come to it

    def replay(self, client: Client, conversation: Conversation) -> None:
        """Sends the conversation's history, and subscribes the client to what follows."""
        start = max(conversation.first, self._journal.oldest)
        self.insert(client, Insert(self._journal.tail, conversation=conversation.number, at=start))
        self.subscribe(client, conversation)

    def subscribe(self, client: Client, conversation: Conversation) -> None:
        """The client gets what is said in the conversation from now on."""
        if conversation.number not in client.subscriptions and not client.gone:
            client.subscriptions[conversation.number] = self._journal.seq
            conversation.subscribers.add(client)

    def repeat(self, client: Client, data: bytes) -> None:
        """A frame that was emitted before, as it was."""
        if client.direct and client.writable:
            client.send(data)
            client.push()
        else:
            self.insert(client, Insert(self._journal.tail, data=data))

    # -- writing and emitting --------------------------------------------------------------------

    def flush(self) -> bool:
        """Journals and emits what was added. False: the disk is full, it is all kept and tried again by itself."""
        try:
            wrote = self._journal.flush()
        except JournalFull:
            if self._retry is None:
                self._retry = asyncio.get_running_loop().call_later(RETRY_S, self._try_again)
                self._on_full(True)
            return False
        except JournalFailed:
            self._items, self._held_bytes = [], 0
            return False
        if self._items:
            self._emit()
        elif wrote and self._behind:
            self.pump_all()
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
            self._on_full(False)
        return True

    def _try_again(self) -> None:
        if not self.flush() and not self._journal.failed:
            self._retry = asyncio.get_running_loop().call_later(RETRY_S, self._try_again)

    def commit(self, position: int) -> bool:
        """As ``flush``, but when the disk is full, what was added from ``position`` on is taken back."""
        before = self.full
        try:
            self._journal.flush()
        except (JournalFull, JournalFailed):
            self._journal.discard(position)
            self._items = [item for item in self._items if item.position < position]
            if before or self._items:
                self.flush()
            return False
        return self.flush()

    def sync_soon(self) -> None:
        """Brings what was journaled to disk in a moment; a result waits for its own sync anyway."""
        self._journal.sync_soon()

    @property
    def position(self) -> int:
        """For ``commit``: where the next record will be."""
        return self._journal.tail

    def _emit(self) -> None:
        items, self._items, self._held_bytes = self._items, [], 0
        touched: set[Client] = set()
        results = False
        for item in items:
            self._emitted = max(self._emitted, item.seq)
            if item.kind == records.RESULT:
                results = True
                if isinstance(item.to, Client) and item.to.cursor is None:
                    item.to.cursor, item.to.gate = item.position, self._journal.written
                    self._behind.add(item.to)
                continue
            group = item.to.subscribers if isinstance(item.to, Conversation) else self.clients
            for client in group:
                if client is not item.without:
                    client.offer(item.position, item.frame)
            touched.update(group)
        for client in touched:
            client.push()
            if client.cursor is not None:
                self._behind.add(client)
        if results:
            self._journal.sync()
        if self._behind:
            self.pump_all()

    def _fall_behind(self, client: Client, position: int) -> None:
        if client.cursor is None:
            client.cursor = position
        self._behind.add(client)
        self._schedule(client)

    # -- feeding from the journal ----------------------------------------------------------------

    def pump_all(self) -> None:
        """Feeds everybody who is behind and can go on: after a flush, after a sync."""
        for client in list(self._behind):
            self._schedule(client)

    def _schedule(self, client: Client) -> None:
        if not client.pump_due:
            client.pump_due = True
            asyncio.get_running_loop().call_soon(self.pump, client)

    def pump(self, client: Client) -> None:
        """Feeds one client a slice."""
        client.pump_due = False
        try:
            for _ in range(SLICE):
                if not self._step(client):
                    break
            else:
                self._schedule(client)
        except JournalGone:
            client.close(4408, FELL_BEHIND)
        except JournalFailed as error:
            client.close(1011, f"store.error: {error}")
        client.push()
        client.regulate_reading()

    def _step(self, client: Client) -> bool:
        """One chunk; False when there is nothing to do for now."""
        if client.cursor is None or client.gone:
            self._behind.discard(client)
            return False
        if not client.writable or client.gate > self._journal.synced:
            return False
        if client.inserts and client.inserts[0].position <= client.cursor:
            return self._insert(client, client.inserts[0])
        found, following = self._journal.read(client.cursor)
        if following != client.cursor:
            self._feed(client, found, following)
            return True
        if not client.inserts:
            client.cursor = None
            self._behind.discard(client)
        return False

    def _insert(self, client: Client, insert: Insert) -> bool:
        if not insert.conversation:
            client.send(insert.data)
            client.inserts.popleft()
            return True
        if insert.at < insert.position:
            found, following = self._journal.read(insert.at)
            for record in found:
                wanted = record.kind == records.UPDATE and record.conversation == insert.conversation
                if wanted and record.at < insert.position:
                    client.send(frame(record.body))
            if following != insert.at:
                insert.at = following
                return True
            if self.full:  # the rest of it is not in the file yet
                return False
        client.inserts.popleft()
        return True

    def _feed(self, client: Client, found: list[Record], following: int) -> None:
        due = client.inserts[0].position if client.inserts else None
        for record in found:
            if due is not None and due <= record.at:
                client.cursor = record.at
                return
            if record.kind == records.RESULT and record.target == client.number:
                if record.end > self._journal.synced:
                    client.cursor, client.gate = record.at, record.end
                    self._journal.sync()
                    return
                client.send(frame(record.body))
            elif wants(client, record):
                client.send(frame(record.body))
        client.cursor = following

    # -- clients ---------------------------------------------------------------------------------

    def leave(self, client: Client) -> None:
        """The client is gone."""
        self.clients.discard(client)
        self._behind.discard(client)

    def close(self) -> None:
        """Nothing is tried again."""
        if self._retry is not None:
            self._retry.cancel()


def wants(client: Client, record: Record) -> bool:
    """Whether a record that is not an answer is for this client."""
    if record.kind not in (records.UPDATE, records.REQUEST, records.NOTICE):
        return False
    if record.flags & records.EXCEPT and record.target == client.number:
        return False
    return record.seq > client.subscriptions.get(record.conversation, 2**63)
