"""What `cortex attach` has to know so that a lost connection goes unnoticed. Pure.

An IDE speaks to one ACP agent that never goes away; behind it, connections come and go. A new
connection is brought to where the last one was: initialized, its conversations loaded (what the IDE
has seen, by seq, is left out), open requests sent again. A prompt carries a messageId, so that the
agent server runs it once however often it is sent.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from broker.errors import Code, CortexError

Message = dict[str, Any]

AGAIN = frozenset(
    {"initialize", "session/new", "session/load", "session/resume", "session/list", "session/prompt"}
    | {"session/set_mode", "session/set_model", "session/set_config_option", "authenticate"}
)
"""Requests that do no harm when they are sent twice."""
OPENS = frozenset({"session/new", "session/load", "session/resume"})
_OWN = "cortex-attach-"


class Memory:
    """Sees every message of the IDE and of the broker. ``new_id`` makes a unique messageId."""

    def __init__(self, new_id: Callable[[], str]) -> None:
        self._new_id = new_id
        self._initialize: Message | None = None
        self._conversations: dict[str, Message] = {}
        self._pending: dict[str, Message] = {}
        self._asked: dict[str, Message | None] = {}
        """The agent's requests by id, with the IDE's answer once it is there."""
        self._seen: dict[str, tuple[Any, int]] = {}
        """Epoch and highest seq that the IDE has, by conversation."""
        self._own: dict[str, str] = {}
        """Our own requests: the conversation that is being loaded, "" for another."""
        self._count = 0

    @property
    def waiting(self) -> bool:
        """The IDE waits for an answer."""
        return bool(self._pending)

    def from_ide(self, message: Message) -> Message:
        """What to send for a message of the IDE."""
        method, ident = message.get("method"), message.get("id")
        if method is None:
            if _key(ident) in self._asked:
                self._asked[_key(ident)] = message
            return message
        if method == "initialize":
            self._initialize = message
        if ident is None:
            return message
        if method == "session/prompt":
            message = self._named(message)
        self._pending[_key(ident)] = message
        return message

    def from_broker(self, message: Message) -> tuple[list[Message], list[Message]]:
        """What the IDE gets and what is answered at once for a message of the broker."""
        if "method" not in message:
            return self._answer(message), []
        if "id" in message:
            return self._request(message)
        return ([message] if self._is_new(message) else []), []

    def resume(self) -> list[Message]:
        """Requests that bring a new connection to where the last was; one after the other is answered."""
        requests = []
        if self._initialize is not None and _key(self._initialize["id"]) not in self._pending:
            requests.append(self._ours("initialize", self._initialize.get("params", {}), ""))
        requests += [self._ours("session/load", params, name) for name, params in self._conversations.items()]
        return requests

    def is_own(self, message: Message) -> bool:
        """Whether it answers a request of ``resume``."""
        return "method" not in message and message.get("id") in self._own

    def again(self) -> tuple[list[Message], list[Message]]:
        """After ``resume``: what to send again, and errors for the IDE where that could do harm."""
        resent = [message for message in self._pending.values() if message["method"] in AGAIN]
        lost = [message for message in self._pending.values() if message["method"] not in AGAIN]
        self._pending = {_key(message["id"]): message for message in resent}
        return resent, [_lost(message) for message in lost]

    def give_up(self, error: CortexError) -> list[Message]:
        """Answers for all that the IDE still waits for."""
        pending, self._pending = list(self._pending.values()), {}
        return [_error(message["id"], f"{error.what}; {error.hint}", error.code) for message in pending]

    def _named(self, message: Message) -> Message:
        """The prompt with a messageId; one that the IDE gave stays."""
        params = dict(message.get("params") or {})
        meta = dict(params.get("_meta") or {})
        cortex = dict(meta.get("cortex") or {})
        cortex.setdefault("messageId", self._new_id())
        return message | {"params": params | {"_meta": meta | {"cortex": cortex}}}

    def _answer(self, message: Message) -> list[Message]:
        if self.is_own(message):
            del self._own[message["id"]]
            return []
        request = self._pending.pop(_key(message.get("id")), None)
        if request is None:
            return []
        params, result = request.get("params") or {}, message.get("result")
        name = params.get("sessionId")
        if request["method"] in OPENS and isinstance(result, dict):
            name = result.get("sessionId") or name
            if isinstance(name, str):
                self._conversations[name] = params | {"sessionId": name}
        self._note(result, name)
        return [message]

    def _request(self, message: Message) -> tuple[list[Message], list[Message]]:
        """A request that came again is not shown again; its answer, if there is one, is given again."""
        key = _key(message["id"])
        if key in self._asked:
            answer = self._asked[key]
            return [], [answer] if answer is not None else []
        self._asked[key] = None
        self._note(message.get("params"), (message.get("params") or {}).get("sessionId"))
        return [message], []

    def _is_new(self, message: Message) -> bool:
        params = message.get("params")
        if message["method"] != "session/update" or not isinstance(params, dict):
            return True
        name = params.get("sessionId")
        if not isinstance(name, str):
            return True
        if name in self._own.values() and self._was_seen(params, name):
            return False
        self._note(params, name)
        return True

    def _was_seen(self, params: Message, name: str) -> bool:
        """While a conversation is loaded again: by seq, or where there is none, certainly."""
        epoch, seq = _place(params)
        if seq is None or name not in self._seen or self._seen[name][0] != epoch:
            return True
        mine = any((one.get("params") or {}).get("sessionId") == name for one in self._pending.values())
        echo = (params.get("update") or {}).get("sessionUpdate") == "user_message_chunk"
        return seq <= self._seen[name][1] or (mine and echo)

    def _note(self, body: Any, name: Any) -> None:
        epoch, seq = _place(body)
        if seq is None or not isinstance(name, str):
            return
        known = self._seen.get(name)
        if known is None or known[0] != epoch or known[1] < seq:
            self._seen[name] = (epoch, seq)

    def _ours(self, method: str, params: Message, name: str) -> Message:
        self._count += 1
        ident = f"{_OWN}{self._count}"
        self._own[ident] = name
        return {"jsonrpc": "2.0", "id": ident, "method": method, "params": params}


def _place(body: Any) -> tuple[Any, int | None]:
    """Epoch and seq in ``_meta.cortex``."""
    meta = body.get("_meta") if isinstance(body, dict) else None
    place = meta.get("cortex") if isinstance(meta, dict) else None
    seq = place.get("seq") if isinstance(place, dict) else None
    return (place.get("epoch"), seq) if isinstance(place, dict) and isinstance(seq, int) else (None, None)


def _key(ident: Any) -> str:
    """JSON-RPC ids 1 and "1" are two."""
    return json.dumps(ident)


def _lost(message: Message) -> Message:
    what = f"the connection broke before {message['method']} was answered; it may have been done"
    return _error(message["id"], what, Code.UNREACHABLE)


def _error(ident: Any, text: str, code: Code) -> Message:
    data = {"code": code.slug, "hint": "look, then send it again"}
    return {"jsonrpc": "2.0", "id": ident, "error": {"code": -32000, "message": text, "data": data}}
