"""`cortex bench replay`: fixed keep-alive times beside the hybrid histogram, on a public trace of serverless use.

The shipped sample is small (bench/data/README.md); ``python -m bench.replay --trace FILE`` takes a whole trace, a
CSV file with the columns HashApp and minute_1 to minute_1440. An app stands for a user. One day is known, so that
learning weighs heavily, and the hour of the week says nothing; who has one minute with a use only is left out.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from bench.lib import Report, target
from broker.session.replay import DAY, FALLBACK, REST, Replayed, fixed, hybrid, replay

SAMPLE = Path(__file__).parent / "data" / "azure-functions-2019-sample.csv"
KEEPS = (10, 20, 60, 240)
EQUAL_MEMORY, EQUAL_MEMORY_P75 = 0.9, 0.9
"""Of the cold starts, and of the share of the third quartile, of a fixed time that keeps as much warm."""

Users = Mapping[str, Sequence[int]]


def sample(path: Path = SAMPLE) -> dict[str, list[int]]:
    """Minutes with a use by app: the file holds the first of them and the gaps, ``GAP*TIMES`` where they repeat."""
    users = {}
    with path.open(newline="") as lines:
        for row in csv.DictReader(lines):
            minute, minutes = 0, []
            for part in row["gaps"].split():
                gap, _, times = part.partition("*")
                for _ in range(int(times or 1)):
                    minute += int(gap)
                    minutes.append(minute)
            users[row["app"]] = minutes
    return users


def trace(path: Path) -> dict[str, list[int]]:
    """Minutes with a use by app, of a trace as Azure publishes them; functions of one app together."""
    found: dict[str, set[int]] = {}
    with path.open(newline="") as lines:
        for row in csv.DictReader(lines):
            those = found.setdefault(row["HashApp"], set())
            those.update(minute for minute in range(DAY) if float(row.get(f"minute_{minute + 1}") or 0) > 0)
    return {app: sorted(minutes) for app, minutes in found.items() if len(minutes) > 1}


def as_costly(users: Users, idle: int) -> Replayed:
    """The shortest fixed time that keeps at least as much warm."""
    low, high = 0, DAY
    while low < high:
        middle = (low + high) // 2
        if replay("", fixed(middle), users, until=DAY).idle >= idle:
            high = middle
        else:
            low = middle + 1
    return replay(f"  fixed {low} min, as much idle", fixed(low), users, until=DAY)


def compare(users: Users) -> list[Replayed]:
    """Every policy, the fixed ones first; after each of the last three the fixed one that keeps as much warm."""
    policies = {f"fixed {keep} min": fixed(keep) for keep in KEEPS}
    policies["hybrid, else 60 min"] = hybrid(60)
    policies[f"hybrid, else {FALLBACK} min"] = hybrid()
    found = [replay(name, policy, users, until=DAY) for name, policy in policies.items()]
    found.append(as_costly(users, found[-1].idle))
    for name, rest in (
        (f"the same, rests of {REST:g} min at least", REST),
        ("the same, no rests (forecast only)", DAY),
    ):
        found.append(replay(name, hybrid(rest=rest), users, until=DAY))
        found.append(as_costly(users, found[-1].idle))
    return found


def fill(report: Report, title: str, users: Users) -> None:
    """The table and the targets of one trace."""
    found = compare(users)
    rows = [["policy", "cold starts", "share", "third quartile of apps", "idle minutes", "beside fixed 10"]]
    for one in found:
        idle = f"{one.idle / found[0].idle:.2f} x"
        rows.append([one.policy, str(one.cold), f"{one.cold_share:.2%}", f"{one.cold_p75:.1%}", str(one.idle), idle])
    report.tables[f"{title}: {found[0].users} apps, {found[0].uses} minutes with a use"] = rows
    report.figures[title] = [asdict(one) | {"cold_share": one.cold_share} for one in found]
    ours, equal = found[-6:-4]
    report.targets.append(target("replay.cold_over_equal_idle", "x", ours.cold / equal.cold, EQUAL_MEMORY))
    report.targets.append(target("replay.p75_over_equal_idle", "x", ours.cold_p75 / equal.cold_p75, EQUAL_MEMORY_P75))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="cortex bench replay", description=__doc__)
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write the figures as JSON; - is stdout")
    parser.add_argument("--long", action="store_true", help="the same: it takes seconds")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="a whole trace instead of the sample")
    arguments = parser.parse_args(argv)
    report = Report("replay")
    if arguments.trace:
        fill(report, arguments.trace.name, trace(arguments.trace))
    else:
        fill(report, "sample", sample())
    return report.finish(arguments.json)


if __name__ == "__main__":
    sys.exit(main())
