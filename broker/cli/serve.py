"""`cortex serve`: runs the broker."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from broker.cli.options import Config, settings

if TYPE_CHECKING:
    from broker.settings import Loaded


def serve(config: Config = None) -> None:
    """Run the broker, and the gateway unless it is a unit of its own."""
    import uvloop

    from broker.host import logs
    from broker.host.dumps import forbid_dumps

    loaded = settings(config)
    broker = loaded.config.broker
    logs.setup(broker.log_level, broker.log_format, node=broker.node)
    forbid_dumps()
    raise typer.Exit(uvloop.run(_run(loaded)))


async def _run(loaded: Loaded) -> int:
    from broker.app import Broker

    return await Broker(loaded).run()
