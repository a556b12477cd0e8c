"""GET /v1/users/{user}/egress and `cortex user egress`."""

from __future__ import annotations

import json
import shlex

from tests.unit.broker.cli.test_verbs import Run, run
from tests.unit.broker.control.conftest import Api, api
from tests.unit.broker.session.test_egress_view import report, row

__all__ = ["api", "run"]


async def test_hosts_of_a_user_are_shown_with_what_allows_them(api: Api) -> None:
    await api.call("PUT", "/v1/users/ann/config/egress", {"hosts": ["b.example"]})
    api.control.egress.heard(report(row("b.example", allowed=2, sent=5, received=7), row("a.example", denied=1)))
    status, told = await api.call("GET", "/v1/users/ann/egress")
    assert status == 200
    denied, allowed = told["hosts"]
    assert (denied["host"], denied["last"], denied["denied"]) == ("a.example", "denied", 1)
    assert json.loads(shlex.split(denied["allow"])[1]) == {"hosts": ["b.example", "a.example"]}
    assert (allowed["allowed"], allowed["sent"], allowed["received"], allowed["allow"]) == (2, 5, 7, "")
    # What the line stores is a valid section, and keeps what was allowed.
    status, _ = await api.call("PUT", "/v1/users/ann/config/egress", json.loads(shlex.split(denied["allow"])[1]))
    assert status == 200
    status, told = await api.call("GET", "/v1/users/bob/egress")
    assert (status, told) == (200, {"user": "bob", "hosts": []})
    status, problem = await api.call("GET", "/v1/users/ann/egress", headers={})
    assert (status, problem["code"]) == (401, "access.admin_required")


async def test_nothing_of_an_erased_user_is_left(api: Api) -> None:
    api.control.egress.heard(report(row("a.example", denied=1)))
    assert (await api.call("DELETE", "/v1/users/ann"))[0] == 200
    assert (await api.call("GET", "/v1/users/ann/egress"))[1]["hosts"] == []


async def test_the_verb_prints_a_table_and_what_to_do(run: Run, api: Api) -> None:
    status, out, err = await run("user", "egress", "ann")
    assert (status, out) == (0, "")
    assert "no host" in err
    api.control.egress.heard(report(row("a.example", 8443, "pip", denied=3, limited=1)))
    status, out, err = await run("user", "egress", "ann")
    assert status == 0
    line = next(line for line in out.splitlines() if line.startswith("a.example"))
    assert line.split()[:9] == ["a.example:8443", "main", "pip", "denied", "0", "3", "1", "0", "0"]
    assert "a.example:8443: denied; allow it with: echo" in err
    status, out, _ = await run("user", "egress", "ann", "--json")
    assert json.loads(out)["hosts"][0]["tool"] == "pip"
