"""Activity over HTTP: what logs say comes in once, and what is made of it goes out."""

from __future__ import annotations

from typing import Any

from broker.session.activity import DAY, HOUR, WEEK_HOURS, hour_of_week
from broker.session.forecast import Expected
from tests.unit.broker.control.conftest import ADMIN, Api

NOON = 1_700_000_000 // DAY * DAY + 12 * HOUR


def tally(user: str, at: float, kind: str = "request", count: int = 1) -> list[Any]:
    return [user, int(at // 60), kind, count, 0, 30]


async def take(api: Api, *tallies: list[Any]) -> Any:
    return await api.call("POST", "/v1/activity/import", {"tallies": list(tallies)})


def at_noon(api: Api) -> list[list[Any]]:
    """Ann comes at noon on ten days; the clock says the morning after them."""
    api.clock[0] = float(NOON + 10 * DAY - 3 * HOUR)
    return [tally("ann", NOON + day * DAY + 300, count=2) for day in range(10)]


async def test_nobody_is_known_at_first(api: Api) -> None:
    status, told = await api.call("GET", "/v1/activity")
    assert (status, told["users"], told["peaks"], told["days_known"]) == (200, [], [], 0)
    status, told = await api.call("GET", "/v1/activity/users/ann")
    assert (status, told["minutes"], told["last_at"], told["window"], told["expected"]) == (200, 0, None, None, None)
    status, told = await api.call("GET", "/v1/activity/forecast")
    assert (status, told["mode"], told["looked_at"], told["expected"]) == (200, "forecast", None, [])


async def test_a_log_is_taken_over_once(api: Api) -> None:
    rows = at_noon(api)
    old, ahead = tally("ann", api.clock[0] - 20 * DAY), tally("ann", api.clock[0] + 3 * DAY)
    assert await take(api, *rows, old, ahead) == (200, {"new": 10, "known": 0, "too_old": 1, "in_future": 1})
    assert await take(api, *rows) == (200, {"new": 0, "known": 10, "too_old": 0, "in_future": 0})


async def test_everybody_and_one(api: Api) -> None:
    await take(api, *at_noon(api), tally("bob", NOON), tally("cat", NOON, "intent"))
    _, told = await api.call("GET", "/v1/activity?limit=1")
    assert [(one["user"], one["minutes"], one["uses"]) for one in told["users"]] == [("ann", 10, 20)]
    assert told["users"][0]["last_hour_at"] == "2023-11-23T12:00:00Z"
    assert told["uses"] == 21
    noon = hour_of_week(NOON // HOUR)
    assert len(told["week"]) == WEEK_HOURS
    assert told["week"][noon] == 1.5
    assert told["peaks"][0] == {"hour_of_week": noon, "value": 1.5}
    _, told = await api.call("GET", "/v1/activity/users/ann")
    assert (told["minutes"], told["first_at"], told["last_at"]) == (10, "2023-11-14T12:05:00Z", "2023-11-23T12:05:30Z")
    assert {place % 24 for place, value in enumerate(told["week"]) if value} == {12}
    assert told["times_away"] == told["times_out_of_range"] > 5
    assert told["window"]["source"] == "recent"
    assert told["leads"] == {"intents": 0, "followed": 0, "median_s": None, "p90_s": None}
    api.clock[0] = NOON + 10 * DAY + 200.0
    _, told = await api.call("GET", "/v1/activity/users/ann")
    assert told["expected"]["start"] == "2023-11-24T12:05:00Z"
    assert told["expected"]["source"] == "hour_of_week"


async def test_a_forecast_is_told_with_times(api: Api) -> None:
    warner = api.control.foresight._warner
    warner._ledger.expect(Expected("bob", 1.7e9, 1.7e9 + 60, 0.5, "recent"), 1.7e9 - 5)
    warner._ledger.arrived("bob", 1.7e9 + 10)
    warner._told = [(Expected("ann", 1.7e9, 1.7e9 + 60, 0.5, "histogram"), "would prewarm")]
    warner._prepared.append({"user": "ann", "at": 1.7e9, "found": {"home": ""}})
    _, told = await api.call("GET", "/v1/activity/forecast")
    assert told["expected"] == [
        {
            "user": "ann",
            "start": "2023-11-14T22:13:20Z",
            "end": "2023-11-14T22:14:20Z",
            "probability": 0.5,
            "source": "histogram",
            "action": "would prewarm",
        }
    ]
    assert told["counts"] == {"hit": 1, "miss": 0, "wasted": 0}
    assert told["ready_s"]["hit"] == 15
    assert told["recent"][0]["at"] == "2023-11-14T22:13:30Z"
    assert told["prepared"][0]["found"] == {"home": ""}


async def test_what_is_no_activity_is_refused_whole(api: Api) -> None:
    good = tally("ann", NOON)
    for place, wrong in ((0, "../x"), (1, -1), (2, "drink"), (3, 0), (4, 60), (5, "x")):
        bad = [*good[:place], wrong, *good[place + 1 :]]
        status, told = await take(api, good, bad)
        assert (status, told["code"]) in ((400, "request.invalid"), (400, "user.invalid_id"))
    status, told = await take(api, *([good] * 5001))
    assert (status, told["code"]) == (400, "request.invalid")
    assert (await api.call("GET", "/v1/activity"))[1]["users"] == []


async def test_only_operators_may_look(api: Api) -> None:
    for method, path in (
        ("GET", "/v1/activity"),
        ("GET", "/v1/activity/users/ann"),
        ("GET", "/v1/activity/forecast"),
        ("POST", "/v1/activity/import"),
    ):
        status, told = await api.call(method, path, headers={"Authorization": f"Bearer x{ADMIN}"})
        assert (status, told["code"]) == (401, "access.admin_required")


async def test_erasing_a_user_erases_their_activity(api: Api) -> None:
    await take(api, *at_noon(api), tally("bob", NOON))
    api.control.foresight.activity.note("ann", api.clock[0], "request")
    assert (await api.call("DELETE", "/v1/users/ann"))[0] == 200
    await api.control.foresight.activity.turn()
    _, told = await api.call("GET", "/v1/activity")
    assert [one["user"] for one in told["users"]] == ["bob"]
    assert (await api.call("GET", "/v1/activity/users/ann"))[1]["minutes"] == 0
