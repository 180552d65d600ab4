"""How often to look, from how memory moves; and what the agent may spend on it."""

from __future__ import annotations

import itertools

import pytest

from memtrack.sampling.cadence import CALM_S, FASTEST_S, SPIKY_S, UNLIMITED_MIB, Budget, Cadence

SECOND_NS = 10**9


def drive(cadence, curve, seconds, headroom=lambda t: UNLIMITED_MIB, start_s=1.0):
    """Ask for the interval as the sampler would; the intervals by the time they were given."""
    found, at_s = [], start_s
    while at_s < start_s + seconds:
        interval_s = cadence.next_interval_s(round(at_s * SECOND_NS), curve(at_s), headroom(at_s))
        assert interval_s >= FASTEST_S
        found.append((at_s, interval_s))
        at_s += interval_s
    return found


def test_calm():
    """When nothing moves the interval relaxes to the slowest, within a few steps."""
    intervals = [interval for _, interval in drive(Cadence(0.1), lambda t: 100.0, 10.0)]
    assert intervals[-1] == CALM_S
    assert intervals.index(CALM_S) < 8


def test_slower_base_than_calm():
    """A user who wants fewer samples gets fewer: the base is then also the slowest."""
    intervals = [interval for _, interval in drive(Cadence(2.0), lambda t: 100.0, 60.0)]
    assert max(intervals) == 2.0


@pytest.mark.parametrize(("mib_per_s", "expected"), [(10.0, 0.1), (640.0, 0.1), (1600.0, 0.04), (10000.0, 0.02)])
def test_growth(mib_per_s, expected):
    """While memory grows by some MiB a tick the base holds; faster growth is watched at 64 MiB a tick."""
    found = drive(Cadence(0.1), lambda t: mib_per_s * t, 5.0)
    for at_s, interval in found:
        if at_s > 3.0:
            # below one MiB a tick the process counts as calm, so the interval swings around the base
            assert expected - 0.02 <= interval <= expected * 1.35


def test_near_the_limit():
    """With little room left, the same growth is watched more closely: a fiftieth of the headroom, 4 MiB at least."""
    wide = drive(Cadence(0.1), lambda t: 200.0 * t, 5.0)[-1][1]
    near = drive(Cadence(0.1), lambda t: 200.0 * t, 5.0, headroom=lambda t: 300.0)[-1][1]
    close = drive(Cadence(0.1), lambda t: 200.0 * t, 5.0, headroom=lambda t: 0.0)[-1][1]
    assert wide == pytest.approx(0.1)
    assert near == pytest.approx(300.0 / 50 / 200, rel=0.1)
    assert close == FASTEST_S


def test_release_counts_as_movement():
    """Memory that falls is watched like memory that grows."""
    found = drive(Cadence(0.1), lambda t: 10000.0 - 1000.0 * t, 5.0)
    assert found[-1][1] <= 0.064 * 1.3


def test_spike_is_watched_for_a_minute():
    """After up and down again within a second, the process is watched every 40 ms for a minute, then no more."""
    found = drive(Cadence(0.1), lambda t: 500.0 if 5.0 <= t < 5.3 else 100.0, 90.0)
    after = [interval for at_s, interval in found if 6.0 < at_s < 64.0]
    assert max(after) <= SPIKY_S
    assert found[-1][1] == CALM_S


def test_rise_that_stays_is_no_spike():
    """A new level, or one that is left after minutes, is not taken for a spike."""
    found = drive(Cadence(0.1), lambda t: 500.0 if 5.0 <= t < 40.0 else 100.0, 60.0)
    assert {interval for at_s, interval in found if 20.0 < at_s < 39.0} == {CALM_S}
    assert found[-1][1] == CALM_S


def test_spike_that_the_kernel_told_of():
    """One that no sample saw counts as well."""
    cadence = Cadence(0.1)
    drive(cadence, lambda t: 100.0, 10.0)
    cadence.spike_seen(11 * SECOND_NS)
    found = drive(cadence, lambda t: 100.0, 5.0, start_s=11.0)
    assert max(interval for _, interval in found[1:]) <= SPIKY_S


# -- budget ---------------------------------------------------------------------------------------------------------


def test_budget_holds_in_the_long_run():
    """Whoever spends more than the share is exhausted, and has to save a tenth before it is not any more."""
    budget = Budget(0.002, 0, 0)
    cpu_ns, spent_s, states = 0, 0.0, []
    for second in range(1, 3600):
        used_s = 0.0005 if states and states[-1] else 0.02
        cpu_ns += round(used_s * SECOND_NS)
        spent_s += used_s
        states.append(budget.spend(second * SECOND_NS, cpu_ns))
    assert any(states)
    assert not all(states)
    assert spent_s / 3600 <= 0.0021 + 0.1 / 3600
    changes = sum(one != other for one, other in itertools.pairwise(states))
    assert changes < 1000


def test_budget_is_saved_up_to_a_minute():
    """A quiet hour is worth no more than a minute's share afterwards."""
    budget = Budget(0.01, 0, 0)
    assert not budget.spend(3600 * SECOND_NS, 0)
    assert not budget.spend(3601 * SECOND_NS, round(0.59 * SECOND_NS))
    assert budget.spend(3602 * SECOND_NS, round(0.70 * SECOND_NS))


def test_start_is_on_credit():
    """What starting up costs does not slow down the first seconds."""
    budget = Budget(0.002, 0, 0)
    assert not budget.spend(SECOND_NS, round(0.02 * SECOND_NS))
