"""`cortex bench http2`: calls to a provider over HTTP/1.1, as the gateway makes them, beside HTTP/2.

The provider's stand-in is nginx, which speaks both over TLS. The clients run alone, each in a process of its own: the
gateway's (pool, TLS, parser), the least one that the h2 package allows, and httpx with either protocol, whose own work
is the same in both. The gateway process as a whole, with that provider behind it, says what a client's share is.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import uvloop

from bench import lib
from bench.gateway_arms import Arm, cortex, section
from bench.peers import gateway_configs as configs
from bench.peers import http_load as load
from bench.peers.tls_load import CLIENTS, SIZES, WIDTHS
from tests.integration.gateway.support import make_ca

ROUNDS, LONG_ROUNDS, TINY_ROUNDS = 3, 9, 1
CASE_S, TINY_CASE_S = 0.25, 0.02
TIMEOUT_S = 60.0
OURS, PLAIN, WHOLE = "cortex, HTTP/1.1", "h2 alone, HTTP/2", "the gateway process"
HTTPX = "httpx, HTTP/1.1", "httpx, HTTP/2"
CASES = [f"{title}, {width}" for title in SIZES for width in WIDTHS]

Rounds = Mapping[str, Mapping[str, Sequence[float]]]
Run = Callable[[], dict[str, float]]


def measured(rounds: int, seconds: float) -> Rounds:
    """By client and figure, each round's value. ``seconds``: of each case."""
    with _clients(seconds) as runs:
        return lib.interleaved(list(runs), rounds, lambda name: runs[name]())


@contextlib.contextmanager
def _clients(seconds: float) -> Iterator[dict[str, Run]]:
    ports = dict(zip(("h2", "http/1.1"), lib.free_ports(2), strict=True))
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="cx-"))
        make_ca(Path(directory), "127.0.0.1")
        config, ca = Path(directory, "nginx.conf"), Path(directory, "cert.pem")
        config.write_text(configs.nginx_tls(ports, directory))
        argv = ["nginx", "-p", directory, "-c", str(config)]
        nginx = stack.enter_context(lib.child(argv, waits=lib.accepts(ports["h2"])))
        [worker] = lib.children_of(nginx.pid)
        provider = section(directory, [], ca_file=str(ca))
        provider["providers"]["bench"]["upstreams"] = [f"https://127.0.0.1:{ports['http/1.1']}"]
        ours = stack.enter_context(cortex(directory, provider))
        alone = Arm(ours.sockets, ours.pids[:1], ours.target)

        def run(name: str) -> Run:
            port = ports["h2" if name.endswith("/2") else "http/1.1"]
            arguments = [name, str(port), str(ca), str(seconds), str(worker)]
            return lambda: _process(lib.python("bench.peers.tls_load", *arguments))

        yield {**{name: run(name) for name in CLIENTS}, WHOLE: lambda: _gateway(alone, worker, seconds)}


def _process(argv: list[str]) -> dict[str, float]:
    ran = subprocess.run(argv, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, timeout=TIMEOUT_S, check=True)
    figures: dict[str, float] = json.loads(ran.stdout)
    return figures


def _gateway(arm: Arm, server: int, seconds: float) -> dict[str, float]:
    """What ``tls_load`` measures over open connections, of the gateway process."""
    figures: dict[str, float] = {}
    for title, size in SIZES.items():
        for width in WIDTHS:
            # Opens all connections, to the provider too.
            uvloop.run(load.calls(arm.port, arm.request(size), width, width))
            cpu, far = lib.cpu_of(arm.pids), lib.cpu_seconds(server)
            seen, took = uvloop.run(load.closed_loop(arm.port, arm.request(size), width, seconds))
            if seen.errors:
                raise RuntimeError(f"answers by status {seen.statuses}")
            calls = seen.calls + width
            figures |= {
                f"{title}, {width}: cpu": (lib.cpu_of(arm.pids) - cpu) / calls * 1e3,
                f"{title}, {width}: server's cpu": (lib.cpu_seconds(server) - far) / calls * 1e3,
                f"{title}, {width}: p50": lib.percentile(seen.took, 0.5) * 1e3,
                f"{title}, {width}: p99": lib.percentile(seen.took, 0.99) * 1e3,
                f"{title}, {width}: per s": len(seen.took) / took,
            }
    return figures


def ratio(seen: Rounds, name: str, to: str, figure: str) -> float:
    """The median of the ratios within a round."""
    pairs = zip(seen[name][figure], seen[to][figure], strict=True)
    return lib.median([one / other for one, other in pairs])


def paid_back(middle: Mapping[str, Mapping[str, float]], case: str) -> float:
    """After so many calls a connection HTTP/2 has cost the CPU that it saved in handshakes; infinite: it costs less."""
    width = case.rpartition(" ")[2]
    saved = (middle[OURS][f"cold, {width}: cpu"] - middle[PLAIN][f"cold, {width}: cpu"]) / int(width)
    more = middle[PLAIN][f"{case}: cpu"] - middle[OURS][f"{case}: cpu"]
    return max(0.0, saved) / more if more > 0 else float("inf")


def fill(report: lib.Report, seen: Rounds, rounds: int) -> None:
    """Tables and targets: the choice of HTTP/1.1 holds as long as HTTP/2 costs more CPU in every case."""
    middle = lib.medians(seen)
    for title in SIZES:
        rows = [["at once:", *(f"{width}: {what}" for width in WIDTHS for what in ("CPU", "server's", "p50", "p99"))]]
        for name, figures in middle.items():
            keys = [f"{title}, {width}: {what}" for width in WIDTHS for what in ("cpu", "server's cpu", "p50", "p99")]
            rows.append([name, *(f"{figures[key]:.3g}" for key in keys)])
        report.tables[f"A call of {title} over open connections, ms; medians of {rounds} rounds"] = rows
    cold = [["at once:", *(f"{width}: {what}" for width in WIDTHS for what in ("CPU", "all answered"))]]
    for name in CLIENTS:
        for label, prefix in ((name, ""), (f"{name}, TLS sessions resumed", "resumed ")):
            keys = [f"cold, {width}: {prefix}{what}" for width in WIDTHS for what in ("cpu", "all")]
            if keys[0] in middle[name]:
                cold.append([label, *(f"{middle[name][key]:.3g}" for key in keys)])
    report.tables["The first calls of a client without a connection, ms"] = cold
    ratios = {
        "h2 alone to ours": {case: ratio(seen, PLAIN, OURS, f"{case}: cpu") for case in CASES},
        "httpx, HTTP/2 to HTTP/1.1": {case: ratio(seen, HTTPX[1], HTTPX[0], f"{case}: cpu") for case in CASES},
    }
    rows = [["", *CASES]]
    rows += [[name, *(f"{found[case]:.2f}" for case in CASES)] for name, found in ratios.items()]
    back = {case: paid_back(middle, case) for case in CASES}
    rows.append(["calls a connection until h2 alone has cost what it saved", *(f"{back[case]:.0f}" for case in CASES)])
    report.tables["CPU a call of the client over HTTP/2 against HTTP/1.1"] = rows
    report.figures |= {"rounds": seen, "ratios": ratios, "paid back after": back}
    least = min(ratios["h2 alone to ours"].values())
    report.targets.append(lib.target_least("CPU a call over HTTP/2 against ours, the least of all", "times", least, 1))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; 1 when HTTP/2 would be the cheaper one."""
    parser = argparse.ArgumentParser(prog="cortex bench http2", description=__doc__)
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write the result as JSON; - is stdout")
    parser.add_argument("--long", action="store_true", help="more rounds")
    parser.add_argument("--tiny", action="store_true", help="only to see that it runs")
    arguments = parser.parse_args(argv)
    rounds = TINY_ROUNDS if arguments.tiny else LONG_ROUNDS if arguments.long else ROUNDS
    report = lib.Report("http2")
    missing = [name for name in ("httpx", "h2") if not importlib.util.find_spec(name)]
    missing += [] if shutil.which("nginx") else ["nginx"]
    if missing:
        report.targets += [lib.target(f"{name} is not installed", "", 1, 0) for name in missing]
    else:
        fill(report, measured(rounds, TINY_CASE_S if arguments.tiny else CASE_S), rounds)
    return report.finish(arguments.json)


if __name__ == "__main__":
    sys.exit(main())
