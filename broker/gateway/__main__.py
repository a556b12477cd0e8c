"""The gateway process: ``python -m broker.gateway --link PATH``. It knows nothing but what the broker tells it."""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import signal
import sys
from pathlib import Path

import structlog
import uvloop

from broker.gateway import lock
from broker.gateway.context import Context
from broker.gateway.orders import Orders
from broker.gateway.table import Table
from broker.host import logs
from broker.host.dumps import forbid_dumps
from broker.host.tasks import TaskOwner

SWEEP_S = 0.5
log = structlog.get_logger("broker.gateway")


def main(argv: list[str] | None = None) -> int:
    """Runs until SIGTERM or SIGINT, then drains; 75 when another gateway holds the lock."""
    options = _parse(argv)
    logs.setup(options.log_level, options.log_format)
    structlog.contextvars.bind_contextvars(process="gateway")
    forbid_dumps()
    if options.lock is not None and lock.take(options.lock) is None:
        log.error("another_gateway_runs", lock=str(options.lock))
        return os.EX_TEMPFAIL
    _raise_file_limit()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(options))
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m broker.gateway", description=__doc__)
    parser.add_argument("--link", type=Path, required=True, help="the broker's socket (gateway.link)")
    parser.add_argument("--lock", type=Path, help="a file that only one gateway at a time may hold")
    parser.add_argument("--alone", type=float, default=0, metavar="S", help="end after S seconds without a broker")
    parser.add_argument("--drain", type=float, default=10, metavar="S", help="how long SIGTERM lets calls go on")
    parser.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    parser.add_argument("--log-format", default="auto", choices=("auto", "json", "text"))
    return parser.parse_args(argv)


def _raise_file_limit() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def _serve(options: argparse.Namespace) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    tasks = TaskOwner("gateway")
    context = Context(tasks)
    table = Table(context)
    orders = Orders(options.link, table, context)
    dialling = tasks.start(orders.run(), "orders")
    tasks.start(context.dialer.warm(), "warm")
    log.info("gateway_started", pid=os.getpid())
    while not stop.is_set():
        _tick(table, context)
        if options.alone and orders.alone_since is not None and loop.time() - orders.alone_since > options.alone:
            log.warning("no_broker_for_too_long")
            break
        await _wait(stop, SWEEP_S)
    dialling.cancel()
    orders.close()
    await _drain(table, context, options.drain)
    await context.close()
    await tasks.close()
    log.info("gateway_stopped")


async def _drain(table: Table, context: Context, seconds: float) -> None:
    """Lets what runs come to its end, for ``seconds`` at most."""
    context.draining = True
    table.drain()
    deadline = asyncio.get_running_loop().time() + seconds
    while not table.idle and (left := deadline - asyncio.get_running_loop().time()) > 0:
        _tick(table, context)
        context.emptied.clear()
        await _wait(context.emptied, min(SWEEP_S, left))
    table.abort()


def _tick(table: Table, context: Context) -> None:
    now = asyncio.get_running_loop().time()
    table.sweep(now)
    context.pool.sweep(now)


async def _wait(event: asyncio.Event, seconds: float) -> None:
    try:
        await asyncio.wait_for(event.wait(), seconds)
    except TimeoutError:
        return


if __name__ == "__main__":
    sys.exit(main())
