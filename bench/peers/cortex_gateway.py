"""A gateway process with many sandboxes' sockets, for the benchmark: ``python -m bench.peers.cortex_gateway SPEC``.

SPEC is a JSON file: ``directory``, ``gateway`` (a [gateway] section), ``slots``, ``users`` (slots are theirs in turn).
This process is the broker's stand-in: it tells the gateway what a broker would and takes its records of usage, but
stores nothing. The gateway is its child. A slot's socket is ``directory/N/gateway``.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path
from typing import Any

import uvloop

from bench.lib import ready
from broker.config import Config
from broker.gateway.child import GatewayChild
from broker.gateway.link import Egress, GatewayLink
from broker.host.tasks import TaskOwner
from broker.session.policies import Policies
from broker.session.providers import FileCredentials, providers_for
from tests.integration.gateway.support import SlotSockets

START_S = 20.0


async def serve(spec: dict[str, Any]) -> None:
    """Until SIGTERM."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    config = Config.model_validate({"gateway": spec["gateway"]})
    directory, tasks = Path(spec["directory"]), TaskOwner("bench")

    def reported(report: dict[str, Any]) -> None:
        if report["kind"] == "usage":
            link.usage_seen(report["boot"], report["upto"])

    link = GatewayLink(directory / "link", tasks, settings=lambda: config.gateway, on_report=reported)
    child = GatewayChild(link, tasks)
    await link.start()
    await child.start()
    try:
        await link.wait_connected(START_S)
        await Policies(link, lambda: config, tasks).start()
        held = [await _slot(link, directory, config, number, spec["users"]) for number in range(spec["slots"])]
        ready()
        await stop.wait()
        for sockets in held:
            sockets.close()
    finally:
        await child.stop(1.0)
        await link.close()
        await tasks.close()


async def _slot(link: GatewayLink, directory: Path, config: Config, number: int, users: int) -> SlotSockets:
    """A sandbox's sockets, served."""
    identity = {"user": f"u{number % users}", "workspace": "main", "session": f"s{number}"}
    sockets = SlotSockets(directory / str(number))
    providers = await providers_for(config, FileCredentials(), identity["user"], {})
    await link.put_slot(str(number), 1, identity, providers, Egress(), sockets.fds)
    return sockets


if __name__ == "__main__":
    uvloop.run(serve(json.loads(Path(sys.argv[1]).read_text())))
