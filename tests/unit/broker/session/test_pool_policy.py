"""What the pool does, for any counts and limits."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from broker.session.pool_policy import Limits, Plan, Stock, plan, wanted

MIB = 2**20
PLENTY = Limits(concurrency=99, tokens=99, budget=10**15, others=0, available=10**15, reserve=0)


@st.composite
def _stock(draw: st.DrawFn, agent: str) -> Stock:
    maximum = draw(st.integers(0, 8))
    ready = draw(st.integers(0, 10))
    awake = draw(st.integers(0, ready))
    return Stock(
        agent=agent,
        wanted=draw(st.integers(0, maximum)),
        maximum=maximum,
        hot=draw(st.integers(0, 6)),
        making=draw(st.integers(0, 4)),
        ready=ready,
        awake=awake,
        still=draw(st.integers(0, awake)),
        asleep=draw(st.integers(0, ready - awake)),
        ending=draw(st.integers(0, 4)),
        stuck=draw(st.integers(0, 4)),
        cost=draw(st.integers(0, 400)) * MIB,
        tries=draw(st.sampled_from([None, None, 0, 1])),
    )


STOCKS = st.integers(1, 3).flatmap(lambda count: st.tuples(*(_stock(name) for name in "abc"[:count])))
LIMITS = st.builds(
    Limits,
    concurrency=st.integers(0, 6),
    tokens=st.integers(0, 8),
    budget=st.integers(0, 8000).map(lambda size: size * MIB),
    others=st.integers(0, 2000).map(lambda size: size * MIB),
    available=st.integers(0, 8000).map(lambda size: size * MIB),
    reserve=st.integers(0, 4000).map(lambda size: size * MIB),
)


def after(stock: Stock, made: Plan) -> Stock:
    return replace(
        stock,
        making=stock.making + made.make.count(stock.agent),
        ready=stock.ready - made.end.get(stock.agent, 0),
        ending=stock.ending + made.end.get(stock.agent, 0),
    )


@given(STOCKS, LIMITS)
def test_never_more_than_wanted_and_never_more_than_may_be(stocks: tuple[Stock, ...], limits: Limits) -> None:
    made = plan(stocks, limits)
    for stock in stocks:
        count = made.make.count(stock.agent)
        if count:
            there = stock.making + stock.ready + stock.ending + count
            assert there <= stock.wanted
            assert there + stock.stuck <= stock.maximum
            assert stock.tries is None or stock.making + count <= stock.tries
    if made.make:
        assert len(made.make) <= limits.tokens
        assert sum(stock.making for stock in stocks) + len(made.make) <= limits.concurrency


@given(STOCKS, LIMITS)
def test_nothing_is_made_beyond_the_budget_or_out_of_the_reserve(stocks: tuple[Stock, ...], limits: Limits) -> None:
    made = plan(stocks, limits)
    then = [after(stock, made) for stock in stocks]
    if any(stock.cost for stock in stocks if stock.agent in made.make):
        assert sum(stock.held for stock in then) + limits.others <= limits.budget
        assert limits.available - sum(stock.cost * stock.making for stock in then) >= limits.reserve


@given(STOCKS, LIMITS)
def test_whoever_lacks_one_and_is_held_back_by_nothing_gets_one(stocks: tuple[Stock, ...], limits: Limits) -> None:
    made = plan(stocks, limits)
    then = [after(stock, made) for stock in stocks]
    if made.end or sum(stock.making for stock in then) >= limits.concurrency or len(made.make) >= limits.tokens:
        return
    room = limits.budget - limits.others - sum(stock.held for stock in then)
    spare = limits.available - limits.reserve - sum(stock.cost * stock.making for stock in then)
    for stock in then:
        blocked = stock.tries is not None and stock.making >= stock.tries
        assert not stock.lacking or blocked or stock.cost > min(room, spare)


@given(STOCKS, LIMITS)
def test_only_what_is_too_much_or_short_of_memory_ends(stocks: tuple[Stock, ...], limits: Limits) -> None:
    made = plan(stocks, limits)
    over = sum(stock.held for stock in stocks) + limits.others > limits.budget
    pressed = limits.available < limits.reserve // 2
    for stock in stocks:
        end = made.end.get(stock.agent, 0)
        surplus = max(0, stock.ready - stock.wanted)
        assert surplus <= end <= stock.ready
        assert end == surplus or over or pressed


@given(STOCKS, LIMITS)
def test_memory_that_is_short_is_given_back_but_no_more_than_is_needed(
    stocks: tuple[Stock, ...], limits: Limits
) -> None:
    made = plan(stocks, limits)
    surplus = {stock.agent: max(0, stock.ready - stock.wanted) for stock in stocks}
    freed = sum(stock.cost * (stock.ending + stock.stuck + made.end.get(stock.agent, 0)) for stock in stocks)
    over = sum(stock.held for stock in stocks) + limits.others - limits.budget
    missing = max(over, limits.reserve // 2 - limits.available)
    left = sum(stock.ready - made.end.get(stock.agent, 0) for stock in stocks if stock.cost)
    assert freed >= missing or not left
    extra = [stock for stock in stocks if made.end.get(stock.agent, 0) > surplus[stock.agent]]
    if extra:
        assert freed - max(stock.cost for stock in extra) < missing


@given(STOCKS, LIMITS)
def test_so_many_are_awake_as_have_to_be(stocks: tuple[Stock, ...], limits: Limits) -> None:
    made = plan(stocks, limits)
    for stock in stocks:
        pause, resume = made.pause.get(stock.agent, 0), made.resume.get(stock.agent, 0)
        assert pause <= stock.still
        assert resume <= stock.asleep
        assert not (pause and resume)
        if made.end.get(stock.agent):
            assert pause == resume == 0
            continue
        want, awake = min(stock.hot, stock.ready), stock.awake - pause + resume
        assert awake >= want or resume == stock.asleep
        assert awake <= want or pause == stock.still


@given(STOCKS, LIMITS)
def test_every_agent_that_is_short_is_told_why(stocks: tuple[Stock, ...], limits: Limits) -> None:
    made = plan(stocks, limits)
    for stock in stocks:
        assert bool(made.short[stock.agent]) == (stock.ready < stock.wanted)
        if made.make.count(stock.agent) or (stock.making and made.short[stock.agent]):
            assert made.short[stock.agent] == "making"


@given(STOCKS, LIMITS.map(lambda limits: replace(limits, concurrency=max(1, limits.concurrency), tokens=8)))
def test_it_comes_to_rest(stocks: tuple[Stock, ...], limits: Limits) -> None:
    """Whatever it began with: all that is begun ends well, and then there is nothing more to do."""
    now = [replace(stock, still=stock.awake, asleep=stock.ready - stock.awake, tries=None) for stock in stocks]
    taken = sum(stock.cost * stock.ready for stock in now)
    for _ in range(200):
        made = plan(now, limits)
        if not (made.make or made.end or made.pause or made.resume or any(s.making or s.ending for s in now)):
            break
        now = [_done(stock, made) for stock in now]
        held = sum(stock.cost * stock.ready for stock in now)
        limits = replace(limits, available=limits.available + taken - held)
        taken = held
    else:
        raise AssertionError(f"it goes on for ever: {made}")
    for stock in now:
        assert stock.ready <= stock.wanted
        assert stock.awake == min(stock.hot, stock.ready)


def _done(stock: Stock, made: Plan) -> Stock:
    agent = stock.agent
    ended = made.end.get(agent, 0)
    asleep = stock.asleep + made.pause.get(agent, 0) - made.resume.get(agent, 0)
    asleep -= min(ended, asleep)
    ready = stock.ready - ended + stock.making + made.make.count(agent)
    return replace(stock, making=0, ending=0, ready=ready, awake=ready - asleep, still=ready - asleep, asleep=asleep)


def test_the_agent_that_lacks_most_comes_first() -> None:
    big = Stock("big", wanted=8, maximum=8, ready=4)
    small = Stock("small", wanted=2, maximum=2)
    assert plan([big, small], replace(PLENTY, concurrency=3)).make == ["small", "big", "small"]


def test_one_that_finds_no_room_does_not_hold_up_another() -> None:
    big = Stock("big", wanted=1, maximum=1, cost=900 * MIB)
    small = Stock("small", wanted=1, maximum=1, cost=100 * MIB)
    made = plan([big, small], replace(PLENTY, budget=500 * MIB))
    assert made.make == ["small"]
    assert made.short == {"big": "memory", "small": "making"}
    assert made.held == {"memory"}


def test_one_that_is_never_let_go_of_does_not_keep_the_pool_short() -> None:
    assert plan([Stock("a", wanted=2, maximum=4, ending=2)], PLENTY).make == []
    assert plan([Stock("a", wanted=2, maximum=4, stuck=2)], PLENTY).make == ["a", "a"]
    held = plan([Stock("a", wanted=2, maximum=4, stuck=4)], PLENTY)
    assert (held.make, held.short) == ([], {"a": "maximum"})


def test_none_is_made_between_half_of_the_reserve_and_all_of_it_and_none_ends() -> None:
    stock = Stock("a", wanted=4, maximum=4, ready=2, cost=100 * MIB)
    between = replace(PLENTY, reserve=1000 * MIB, available=700 * MIB)
    made = plan([stock], between)
    assert (made.make, made.end, made.short) == ([], {}, {"a": "memory"})
    assert plan([stock], replace(between, available=450 * MIB)).end == {"a": 1}
    assert plan([replace(stock, ending=1)], replace(between, available=450 * MIB)).end == {}


@given(st.integers(0, 20), st.integers(0, 20), st.integers(0, 20))
def test_what_is_wanted_lies_between_the_bounds(minimum: int, more: int, target: int) -> None:
    assert minimum <= wanted(minimum, target, minimum + more) <= minimum + more
    if minimum <= target <= minimum + more:
        assert wanted(minimum, target, minimum + more) == target
