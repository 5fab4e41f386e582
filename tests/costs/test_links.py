import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.costs import (
    FluidState,
    SharedLink,
    advance,
    change_links,
    fair_rates,
    next_end_s,
    path_delay_s,
    ramp_s,
    retransmit_s,
    start_flow,
    stop_flow,
)
from plait.errors import MissingCost

NAMES = ("a", "b", "c", "d")
bandwidths = st.fixed_dictionaries({name: st.floats(1.0, 1e9) for name in NAMES})
paths = st.lists(
    st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True), min_size=1, max_size=8
)


def links_of(bandwidths: dict[str, float], one_way_s: float = 0.0) -> dict[str, SharedLink]:
    return {
        name: SharedLink(bandwidth_bytes_per_s=value, one_way_s=one_way_s)
        for name, value in bandwidths.items()
    }


def test_three_flows_over_two_links_share_as_in_the_textbook() -> None:
    links = links_of({"a": 10.0, "b": 16.0})
    assert fair_rates({"x": ("a", "b"), "y": ("a",), "z": ("b",)}, links) == {"x": 5.0, "y": 5.0, "z": 11.0}


@given(bandwidths, paths)
def test_no_link_carries_more_than_it_can_and_nobody_could_have_more(
    bandwidths: dict[str, float], paths: list[list[str]]
) -> None:
    flows = {str(number): tuple(path) for number, path in enumerate(paths)}
    rates = fair_rates(flows, links_of(bandwidths))
    used = {name: sum(rates[id] for id, path in flows.items() if name in path) for name in NAMES}
    assert all(used[name] <= bandwidths[name] * (1 + 1e-9) for name in NAMES)
    for id, path in flows.items():  # each flow has a full link of which nobody has more than it does
        assert any(
            used[name] >= bandwidths[name] * (1 - 1e-9)
            and rates[id] >= max(rates[other] for other, its in flows.items() if name in its) * (1 - 1e-9)
            for name in path
        )


def test_a_late_flow_slows_an_early_one_while_both_go_on() -> None:
    links = links_of({"a": 10.0})
    state = start_flow(FluidState(), links, "x", ("a",), 100.0, 0.0)
    assert next_end_s(state) == 10.0
    state, ended = advance(state, links, 5.0)
    assert ended == ()
    state = start_flow(state, links, "y", ("a",), 25.0, 5.0)
    state, ended = advance(state, links, 100.0)
    assert ended == (("y", 10.0), ("x", 12.5))
    assert state.flows == ()


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(1, 1000)), min_size=1, max_size=6), st.floats(0.01, 3))
def test_looking_more_often_changes_nothing(arrivals: list[tuple[float, float]], every_s: float) -> None:
    links = links_of({"a": 50.0})
    ends: list[dict[str, float]] = []
    for looks in ([], [every_s * number for number in range(1, 40)]):
        state, done = FluidState(), dict[str, float]()
        events = [(at_s, str(number), size) for number, (at_s, size) in enumerate(sorted(arrivals))]
        events += [(at_s, "", 0.0) for at_s in looks]
        for at_s, id, size in sorted(events):
            state, ended = advance(state, links, at_s)
            done |= dict(ended)
            if id:
                state = start_flow(state, links, id, ("a",), size, at_s)
        state, ended = advance(state, links, 1e6)
        ends.append(done | dict(ended))
    assert ends[0] == pytest.approx(ends[1], rel=1e-9, abs=1e-9)


def test_a_dead_link_stops_its_flows_until_it_is_back() -> None:
    links = links_of({"a": 10.0})
    state = start_flow(FluidState(), links, "x", ("a",), 100.0, 0.0)
    state, _ = advance(state, links, 4.0)
    dead = links_of({"a": 0.0})
    state = change_links(state, dead, 4.0)
    assert next_end_s(state) == math.inf
    state, ended = advance(state, dead, 50.0)
    assert ended == ()
    assert next_end_s(change_links(state, links, 50.0)) == 56.0


def test_a_flow_that_is_given_up_leaves_its_share_to_the_others() -> None:
    links = links_of({"a": 10.0})
    state = start_flow(FluidState(), links, "x", ("a",), 100.0, 0.0)
    state = start_flow(state, links, "y", ("a",), 100.0, 0.0)
    assert next_end_s(stop_flow(state, links, "y", 2.0)) == 2.0 + 90.0 / 10.0


def test_a_flow_within_a_machine_ends_at_once_and_an_empty_one_too() -> None:
    links = links_of({"a": 10.0})
    state = start_flow(FluidState(), links, "inside", (), 1e9, 1.0)
    state = start_flow(state, links, "empty", ("a",), 0.0, 1.0)
    assert advance(state, links, 1.0)[1] == (("inside", 1.0), ("empty", 1.0))


def test_an_unknown_link_is_named() -> None:
    with pytest.raises(MissingCost, match="link 'tunnel'"):
        fair_rates({"x": ("tunnel",)}, {})


def test_delay_and_bandwidth_of_one_transfer() -> None:
    link = SharedLink(bandwidth_bytes_per_s=100.0, one_way_s=0.5)
    assert link.transfer_s(200.0) == 2.5
    assert link.transfer_s(200.0, flows=3) == 6.5
    assert path_delay_s({"a": link, "b": link}, ("a", "b")) == 1.0


def test_loss_delays_as_often_as_rounds_are_needed() -> None:
    rng = np.random.default_rng(0)
    links = {"a": SharedLink(bandwidth_bytes_per_s=1e9, one_way_s=0.05, loss_fraction=0.1)}
    segments = 20
    rounds = rng.geometric(0.9, size=(20_000, segments)).max(axis=1) - 1
    assert retransmit_s(links, ("a",), segments * 1460) == pytest.approx(0.1 * rounds.mean(), rel=0.02)
    assert retransmit_s(links_of({"a": 1.0}, 0.05), ("a",), 1e6) == 0.0


def test_a_fresh_connection_waits_for_its_window() -> None:
    links = links_of({"a": 1e6}, one_way_s=0.05)
    assert ramp_s(links, ("a",), 10_000) == 0.0  # one window
    # 14,600 bytes leave in 14.6 ms of a round trip of 100, then twice, four and, after that, enough to fill it
    assert ramp_s(links, ("a",), 1e6) == pytest.approx(0.1 - 0.0146 + 0.1 - 0.0292 + 0.1 - 0.0584)
