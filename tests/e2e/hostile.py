"""An agent that means ill: speaks ACP on stdio, and does what a prompt names to whatever it can reach.

Runs inside a sandbox, standard library only. The reply of a prompt is a JSON object of what happened.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import struct
import sys
import time
from collections.abc import Callable
from typing import Any

RUN = "/run/cortex/"
VERSION = 1
READ_S = 8.0


def pack(value: Any) -> bytes:
    """msgpack, as much as is needed."""
    if isinstance(value, bool):
        return b"\xc3" if value else b"\xc2"
    if isinstance(value, int):
        return struct.pack(">Bq", 0xD3, value)
    if isinstance(value, str):
        data = value.encode()
        return struct.pack(">BI", 0xDB, len(data)) + data
    if isinstance(value, bytes):
        return struct.pack(">BI", 0xC6, len(value)) + value
    pairs = b"".join(pack(key) + pack(item) for key, item in value.items())
    return struct.pack(">BI", 0xDF, len(value)) + pairs


def message(**fields: Any) -> bytes:
    """One message of the wire between agent server and broker."""
    body = pack(fields)
    return struct.pack(">I", len(body)) + body


def preamble(kind: str, secret: bytes = b"", version: int = VERSION, segment: int = -1) -> bytes:
    return message(t="preamble", kind=kind, version=version, secret=secret, segment=segment)


def dial(name: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(READ_S)
    sock.connect(RUN + name)
    return sock


def tell(name: str, data: bytes) -> str:
    """What came back for ``data``: hex of it, ``closed``, ``silent``, or the error."""
    try:
        with dial(name) as sock:
            sock.sendall(data)
            got, fds, _, _ = socket.recv_fds(sock, 4096, 4)
    except TimeoutError:
        return "silent"
    except OSError as error:
        return "closed" if isinstance(error, ConnectionError) else f"error {error}"
    if fds:
        return f"{len(fds)} descriptors"
    return got[:400].hex() or "closed"


def strangers(_: str) -> dict[str, Any]:
    """What somebody who does not know the secret is told."""
    hello = message(t="hello", pid=os.getpid())
    return {
        "second hello": tell("agent", preamble("control") + hello),
        "wrong secret": tell("agent", preamble("control", b"x" * 32) + hello),
        "stream": tell("agent", preamble("stream")),
        "journal": tell("agent", preamble("journal", b"y" * 32)),
        "other version": tell("agent", preamble("control", b"", 99) + hello),
        "other kind": tell("agent", preamble("root")),
        "no preamble": tell("agent", hello),
        "garbage": tell("agent", random.randbytes(4096)),
        "giant": tell("agent", b"\x7f\xff\xff\xff" + bytes(65536)),
        "nothing": tell("agent", b""),
    }


def break_rules(count: str) -> dict[str, Any]:
    """Breaks the protocol again and again."""
    done = 0
    for _ in range(int(count)):
        with contextlib.suppress(OSError), dial("agent") as sock:
            sock.sendall(random.randbytes(64))
            done += 1
    return {"done": done}


def flood(argument: str) -> dict[str, Any]:
    """Dials and writes as fast as it can for some seconds, then holds what it has."""
    name, _, seconds = argument.partition(" ")
    end = time.monotonic() + float(seconds)
    held: list[socket.socket] = []
    dials = sent = 0
    junk = random.randbytes(65536)
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            sock = socket.socket(socket.AF_UNIX)
            sock.setblocking(False)
            sock.connect(RUN + name)
            dials += 1
            if len(held) < 400:
                held.append(sock)
        for sock in held[-5:]:
            with contextlib.suppress(OSError):
                sent += sock.send(junk)
    for sock in held:
        sock.close()
    return {"dials": dials, "sent": sent}


def http(argument: str) -> dict[str, Any]:
    """What the gateway's sockets say to bad requests: the status of each."""
    del argument
    get = "GET {} HTTP/1.1\r\nHost: x\r\n\r\n"
    connect = "CONNECT {0} HTTP/1.1\r\nHost: {0}\r\n\r\n"
    asked = {
        "garbage": ("gateway", b"\x16\x03\x01" + random.randbytes(200) + b"\r\n\r\n"),
        "unknown provider": ("gateway", get.format("/nobody/v1").encode()),
        "way up": ("gateway", get.format("/../etc/passwd").encode()),
        "whole url": ("gateway", get.format("http://127.0.0.1:1/x").encode()),
        "giant head": ("gateway", b"GET /x HTTP/1.1\r\nX: " + b"y" * 200_000),
        "two lengths": (
            "gateway",
            b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        ),
        "other host": ("egress", connect.format("example.org:443").encode()),
        "loopback": ("egress", connect.format("127.0.0.1:443").encode()),
        "metadata": ("egress", connect.format("169.254.169.254:80").encode()),
        "other port": ("egress", connect.format("pkgs.example:22").encode()),
    }
    answers = {}
    for name, (where, data) in asked.items():
        said = tell(where, data)
        with contextlib.suppress(ValueError):
            said = bytes.fromhex(said).split(b"\r\n")[0].decode(errors="replace")[:12]
        answers[name] = said
    return answers


def say_garbage(_: str) -> dict[str, Any]:
    """Rubbish on standard output, between honest messages."""
    lines = [b"", b"not json", b"\xff\xfe", b"[]", b"null", b"7", b'{"jsonrpc":"2.0"}', b"[" * 100_000]
    lines += [b'{"jsonrpc":"2.0","id":987654,"result":{}}', b'{"jsonrpc":"2.0","id":"init","error":7}']
    lines += [b'{"jsonrpc":"2.0","method":"session/update","params":{"sessionId":["x"]}}']
    lines += [b'{"jsonrpc":"2.0","method":"session/update","params":"none"}']
    lines += [b'{"jsonrpc":"2.0","method":"session/update","params":{"sessionId":"\\ud800"}}']
    lines += [b'{"jsonrpc":"2.0","id":{"a":1},"method":"session/request_permission","params":{}}']
    lines += [b'{"jsonrpc":"2.0","id":1,"method":"fs/read_text_file","params":{"path":"/etc/passwd"}}']
    lines += [b'{"jsonrpc":"2.0","id":2,"method":"terminal/create","params":{"command":"id"}}']
    lines += [b'{"a":' * 50_000, b"x" * 3_000_000]
    for line in lines * 3:
        put(line + b"\n")
    return {"lines": len(lines) * 3}


def say_much(argument: str) -> dict[str, Any]:
    """A flood of updates that nobody asked for."""
    session, _, count = argument.partition(" ")
    for number in range(int(count)):
        update(session, f"{number} " + "z" * 400)
    return {"updates": int(count)}


def put(data: bytes) -> None:
    while data:
        data = data[os.write(1, data) :]


def send(**fields: Any) -> None:
    put(json.dumps({"jsonrpc": "2.0", **fields}).encode() + b"\n")


def update(session: str, text: str) -> None:
    chunk = {"sessionUpdate": "agent_message_chunk", "content": {"type": "text", "text": text}}
    send(method="session/update", params={"sessionId": session, "update": chunk})


DEEDS: dict[str, Callable[[str], dict[str, Any]]] = {
    "strangers": strangers,
    "break": break_rules,
    "flood": flood,
    "http": http,
    "garbage": say_garbage,
    "much": say_much,
}


def answer(method: str, params: dict[str, Any]) -> dict[str, Any]:
    """The result of a request."""
    if method == "initialize":
        return {"protocolVersion": 1, "agentCapabilities": {}, "authMethods": []}
    if method == "session/new":
        return {"sessionId": "hostile-1"}
    if method == "session/prompt":
        name, _, argument = params["prompt"][0]["text"].partition(" ")
        done = DEEDS[name](argument.replace("{session}", params["sessionId"]))
        update(params["sessionId"], "REPORT" + json.dumps(done))
        return {"stopReason": "end_turn"}
    return {}


def main() -> None:
    for line in sys.stdin:
        asked = json.loads(line)
        if "method" in asked and "id" in asked:
            send(id=asked["id"], result=answer(asked["method"], asked.get("params") or {}))


if __name__ == "__main__":
    main()
