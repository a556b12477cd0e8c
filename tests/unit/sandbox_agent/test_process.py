from __future__ import annotations

import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from sandbox_agent.process import BACKOFF_S, STABLE_S, RestartPolicy


@given(st.integers(0, 20), st.lists(st.floats(0, STABLE_S - 0.01), max_size=40))
def test_an_agent_that_keeps_dying_is_given_up_after_max_restarts(limit: int, lives: list[float]) -> None:
    policy = RestartPolicy(limit)
    pauses = [policy.died(life) for life in lives]
    assert all(pause is not None for pause in pauses[:limit])
    assert all(pause is None for pause in pauses[limit:])
    taken = [pause for pause in pauses if pause is not None]
    assert taken == sorted(taken)
    assert all(BACKOFF_S[0] <= pause <= BACKOFF_S[1] for pause in taken)


def test_the_pause_doubles() -> None:
    policy = RestartPolicy(10)
    assert [policy.died(1) for _ in range(8)] == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0]


def test_a_long_life_or_a_finished_turn_starts_the_count_anew() -> None:
    policy = RestartPolicy(1)
    assert policy.died(1) == 0.2
    policy.proved()
    assert policy.died(1) == 0.2
    assert policy.died(STABLE_S) == 0.2
    assert policy.died(1) is None


ORPHANS = """
import asyncio, os, sys
from sandbox_agent import spawn
from sandbox_agent.process import ExitWatch, reap_orphans

async def main():
    seen = asyncio.get_running_loop().create_future()
    awaited = spawn.spawn(["/bin/sh", "-c", "exit 5"], {}, "/")
    watch = ExitWatch(awaited, seen.set_result)
    nobodys = spawn.spawn(["/bin/sh", "-c", "exit 7"], {}, "/")
    for child in (awaited, nobodys):
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    first = reap_orphans()
    status = await asyncio.wait_for(seen, 10)
    print(first, status, reap_orphans(), os.path.exists(f"/proc/{nobodys.pid}"))

asyncio.run(main())
"""


def test_orphans_are_taken_in_but_a_status_that_somebody_wants_is_left_to_them() -> None:
    ran = subprocess.run([sys.executable, "-c", ORPHANS], capture_output=True, text=True, timeout=30, check=True)
    assert ran.stdout.split() == ["False", "5", "True", "False"]
