"""`cortex bench gateway`: ours beside nginx, HAProxy, LiteLLM and Portkey, then what only a gateway like ours does.

Ours is the gateway process and the forwarder inside the sandbox. All have the same stand-in provider behind them and
the same load in front; the provider's own time is measured in the same rounds. Parts: ``compare`` (calls and streams,
one at a time and 64 at once), ``gone`` (a client that leaves), ``crowd`` (a hundred sandboxes), ``sessions``
(document 001), ``flood``, ``failover`` and ``cache`` (document 004). ``--long``: more rounds, whole minutes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from bench import lib
from bench.gateway_faults import failover, repeating
from bench.gateway_gone import gone
from bench.gateway_load import crowd, flood, sessions
from bench.gateway_rounds import TINY, Sizes, compare

ROUNDS, LONG_ROUNDS = 5, 11
SESSIONS_S, LONG_SESSIONS_S = 15.0, 60.0
FAILOVER_S, LONG_FAILOVER_S = 30.0, 300.0


def parts(report: lib.Report, *, long: bool, tiny: bool) -> dict[str, Callable[[], None]]:
    """By name, in the order in which they run."""
    if tiny:
        return {
            "compare": lambda: compare(report, 1, TINY),
            "gone": lambda: gone(report, 2),
            "crowd": lambda: crowd(report, 1),
            "sessions": lambda: sessions(report, 3),
            "flood": lambda: flood(report, 5),
            "failover": lambda: failover(report, 6),
            "cache": lambda: repeating(report, 4),
        }
    return {
        "compare": lambda: compare(report, LONG_ROUNDS if long else ROUNDS, Sizes()),
        "gone": lambda: gone(report),
        "crowd": lambda: crowd(report),
        "sessions": lambda: sessions(report, LONG_SESSIONS_S if long else SESSIONS_S),
        "flood": lambda: flood(report),
        "failover": lambda: failover(report, LONG_FAILOVER_S if long else FAILOVER_S),
        "cache": lambda: repeating(report),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; 1 when a target is missed."""
    parser = argparse.ArgumentParser(prog="cortex bench gateway", description=__doc__)
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write the result as JSON; - is stdout")
    parser.add_argument("--long", action="store_true", help="more rounds, whole minutes, five minutes of failover")
    parser.add_argument("--tiny", action="store_true", help="only to see that it runs")
    names = list(parts(lib.Report(""), long=False, tiny=False))
    parser.add_argument("--only", action="append", choices=names, help="this part; may be given again")
    arguments = parser.parse_args(argv)
    report = lib.Report("gateway")
    for name, part in parts(report, long=arguments.long, tiny=arguments.tiny).items():
        if not arguments.only or name in arguments.only:
            part()
    return report.finish(arguments.json)


if __name__ == "__main__":
    sys.exit(main())
