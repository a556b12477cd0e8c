"""A gateway process with many sandboxes' sockets, for the benchmark: ``python -m bench.peers.cortex_gateway SPEC``.

SPEC is a JSON file: ``directory``, ``gateway`` (a [gateway] section), ``slots``, ``users`` (slots are theirs in turn).
This process is the broker's stand-in; the gateway is its child. A slot's socket is ``directory/N/gateway``.
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
from broker.session.policies import Policies
from broker.session.providers import FileCredentials, providers_for
from tests.integration.gateway.support import NOWHERE, Rig


async def serve(spec: dict[str, Any]) -> None:
    """Until SIGTERM."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    config = Config.model_validate({"gateway": spec["gateway"]})
    rig = Rig(Path(spec["directory"]), config.gateway)
    await rig.start()
    try:
        await Policies(rig.link, lambda: config, rig.tasks).start()
        for number in range(spec["slots"]):
            user = f"u{number % spec['users']}"
            identity = {"user": user, "workspace": "main", "session": f"s{number}"}
            providers = await providers_for(config, FileCredentials(), user, {})
            await rig.put(providers, NOWHERE, slot=str(number), identity=identity)
        ready()
        await stop.wait()
    finally:
        await rig.stop()


if __name__ == "__main__":
    uvloop.run(serve(json.loads(Path(sys.argv[1]).read_text())))
