"""A client that goes away in the midst of a stream: how long until the provider's side of it is broken off."""

from __future__ import annotations

import contextlib
import itertools
import re
import socket
import tempfile
import time

from bench import lib
from bench.gateway_arms import ALONE, Arm, cortex, haproxy, nginx, provider, section
from bench.peers import http_load as load

ROUNDS = 30
EVERY_MS, TOKENS = 50, 2
"""Between tokens; so many are read before the client goes."""
UNREAD_S = 0.1
"""The client goes within this time after the last that it read; what came since makes its close a reset (RFC 1122)."""
GONE_P99_MS = 100.0
TIMEOUT_S = 5.0
_NUMBER = re.compile(rb"\r\n\r\n(\d+)$")


def gone(report: lib.Report, rounds: int = ROUNDS) -> None:
    """Every round each way's client closes at another moment between two tokens."""
    far = lib.free_port()
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="cx-"))
        stack.enter_context(provider(far))
        ours = stack.enter_context(cortex(directory, section(directory, [far])))
        ways = {"direct": Arm((far,)), "cortex": ours, ALONE: Arm(ours.sockets, target=ours.target)}
        for name, start in (("nginx", nginx), ("haproxy", haproxy)):
            if (other := start(stack, directory, far)) is not None:
                ways[name] = other
        moments = {name: itertools.count() for name in ways}
        seen = lib.interleaved(
            list(ways), rounds, lambda name: {"ms": _leave(ways[name], far, next(moments[name]) / rounds * UNREAD_S)}
        )
    rows = [["", "p50, ms", "p99, ms"]]
    for name, figures in seen.items():
        rows.append([name, *(f"{lib.percentile(figures['ms'], at):.3g}" for at in (0.5, 0.99))])
    title = f"A client goes amid a stream of tokens {EVERY_MS} ms apart: until the provider's side is closed"
    report.tables[f"{title}; {rounds} rounds"] = rows
    report.figures["client gone"] = seen
    report.targets.append(
        lib.target(
            "client gone: upstream cancelled, p99", "ms", lib.percentile(seen["cortex"]["ms"], 0.99), GONE_P99_MS
        )
    )


def _leave(arm: Arm, far: int, after_s: float) -> float:
    """ms; infinite where the stream went on to its end."""
    request = arm.request(700, stream=True, model=f"every-{EVERY_MS}")
    with _connected(far) as notice, _connected(arm.port) as client:
        notice.sendall(b"GET /gone HTTP/1.1\r\nhost: x\r\n\r\n")
        client.sendall(request)
        seen = b""
        while seen.count(b"at=") < TOKENS:
            seen += _more(client)
        time.sleep(after_s)
        left = time.monotonic_ns()
        client.close()
        told = b""
        while not (at := _NUMBER.search(told)):
            try:
                told += _more(notice)
            except TimeoutError:
                return float("inf")
        return (int(at[1]) - left) / 1e6


def _more(sock: socket.socket) -> bytes:
    data = sock.recv(65_536)
    if not data:
        raise RuntimeError("the connection was closed too early")
    return data


def _connected(where: load.Where) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX if isinstance(where, str) else socket.AF_INET)
    sock.settimeout(TIMEOUT_S)
    sock.connect(where if isinstance(where, str) else ("127.0.0.1", where))
    return sock
