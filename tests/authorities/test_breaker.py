"""The breaker against a model of it, with a clock that may also go backwards."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from mlflow_hokusai_auth.authorities.breaker import Breaker

THRESHOLD = 5
COOL_DOWN = 1.0
MAX_PROBE = 20.0


def begun(breaker: Breaker, now: float) -> int:
    """Return the ticket of a call, which the breaker must permit."""
    ticket = breaker.begin(now)
    assert ticket is not None
    return ticket


def opened(now: float = 0.0) -> Breaker:
    breaker = Breaker(THRESHOLD, MAX_PROBE)
    for _ in range(THRESHOLD):
        breaker.failed(begun(breaker, now), now, COOL_DOWN)
    return breaker


class Against(RuleBasedStateMachine):
    """Calls begin and end in any order, while the clock moves forwards and backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.breaker = Breaker(THRESHOLD, MAX_PROBE)
        self.now = 1000.0
        self.state = "closed"
        self.streak = 0
        #: Seconds since the breaker opened, or since the clock was set back to before that.
        self.rested = 0.0
        #: The time at which the current probe began.
        self.probed_at = 0.0
        #: Calls under way, each with the number of the state in which it began.
        self.calls: list[tuple[int, int]] = []
        self.era = 0

    def turn(self, state: str) -> None:
        self.state = state
        self.era += 1
        self.streak = 0
        self.rested = 0.0

    @rule(seconds=st.integers(0, 3 * 64))
    def pass_time(self, seconds: int) -> None:
        # Floats add 64ths exactly.
        self.now += seconds / 64
        self.rested += seconds / 64

    @rule(seconds=st.integers(1, 10_000))
    def set_back(self, seconds: int) -> None:
        self.now -= seconds
        self.rested = max(0.0, self.rested - seconds)
        if self.state == "open":
            self.ask()  # The breaker notices a clock set back only then.

    @rule()
    def begin(self) -> None:
        self.ask()

    def ask(self) -> None:
        ticket = self.breaker.begin(self.now)
        if self.state == "closed":
            assert ticket is not None
        elif self.state == "half-open":
            lost = not self.probed_at <= self.now < self.probed_at + MAX_PROBE
            assert (ticket is not None) == lost, "one probe at a time"
            if lost:
                self.turn("half-open")
                self.probed_at = self.now
        else:
            assert (ticket is not None) == (self.rested >= COOL_DOWN)
            if ticket is not None:
                self.turn("half-open")
                self.probed_at = self.now
        if ticket is not None:
            self.calls.append((ticket, self.era))

    @rule(data=st.data())
    def succeed(self, data: st.DataObject) -> None:
        if not self.calls:
            return
        ticket, era = self.calls.pop(data.draw(st.integers(0, len(self.calls) - 1)))
        closes = self.breaker.succeeded(ticket)
        assert closes == (era == self.era and self.state == "half-open")
        if era == self.era:
            self.streak = 0
            if closes:
                self.turn("closed")

    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        if not self.calls:
            return
        ticket, era = self.calls.pop(data.draw(st.integers(0, len(self.calls) - 1)))
        opens = self.breaker.failed(ticket, self.now, COOL_DOWN)
        expected = era == self.era and (self.state == "half-open" or self.streak == THRESHOLD - 1)
        assert opens == (expected and self.state == "closed")
        if expected:
            self.turn("open")
        elif era == self.era:
            self.streak += 1

    @invariant()
    def tells_its_state(self) -> None:
        assert self.breaker.closed == (self.state == "closed")
        assert self.breaker._probing == (self.state == "half-open")


TestAgainstModel = Against.TestCase


def test_it_opens_after_failures_in_a_row_only() -> None:
    breaker = Breaker(THRESHOLD, MAX_PROBE)
    for _ in range(10):
        for _ in range(THRESHOLD - 1):
            assert not breaker.failed(begun(breaker, 0), 0, COOL_DOWN)
        breaker.succeeded(begun(breaker, 0))
    assert breaker.closed


def test_a_single_probe_decides() -> None:
    breaker = opened()
    assert breaker.begin(0.99) is None
    probe = begun(breaker, 1.0)
    assert [breaker.begin(1.0 + later) for later in (0, 1, MAX_PROBE - 0.01)] == [None] * 3
    assert not breaker.failed(probe, 5.0, COOL_DOWN)
    assert breaker.begin(5.9) is None
    breaker.succeeded(begun(breaker, 6.0))
    assert breaker.closed


def test_lost_probe_is_replaced_by_another() -> None:
    breaker = opened()
    lost = begun(breaker, 1.0)
    probe = begun(breaker, 1.0 + MAX_PROBE)
    # The lost probe's late outcome is ignored.
    breaker.succeeded(lost)
    assert not breaker.closed and breaker.begin(1.1 + MAX_PROBE) is None
    breaker.succeeded(probe)
    assert breaker.closed


def test_clock_set_back_during_a_probe_permits_another() -> None:
    breaker = opened()
    assert breaker.begin(1000.0) is not None
    assert breaker.begin(5.0) is not None


def test_calls_from_before_it_opened_do_not_keep_it_open() -> None:
    breaker = Breaker(THRESHOLD, MAX_PROBE)
    for number, ticket in enumerate([begun(breaker, 0) for _ in range(200)]):
        breaker.failed(ticket, number / 100, COOL_DOWN)
    assert breaker.begin((THRESHOLD - 1) / 100 + COOL_DOWN) is not None


def test_a_clock_set_back_delays_by_one_cool_down() -> None:
    breaker = opened(1_000_000.0)
    assert breaker.begin(5.0) is None
    assert breaker.begin(5.0 + COOL_DOWN) is not None
