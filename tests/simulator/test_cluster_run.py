"""Requests over a simulated cluster: what must hold in every run, whatever breaks."""

import tracemalloc

import numpy as np
import pytest
from clusters import LinearCosts, machine, replicas, run_of, swarm, trace

from plait.routing import RouteWish
from plait.scheduling import StepLimits
from plait.simulator import FAULT_KINDS, Deadlock, EventFailed, FaultRate, RunFault, draw_faults
from plait.simulator.faults_of_run import swizzled
from plait.workload import TraceRequest


def asked(*arrivals_s: float, prompt: int = 32, output: int = 10) -> list[TraceRequest]:
    return [TraceRequest(arrival_s=at_s, prompt_tokens=prompt, output_tokens=output) for at_s in arrivals_s]


def test_a_lone_request_takes_the_time_of_its_steps_and_its_links() -> None:
    run = run_of(replicas(1), asked(1.0))
    run.run()
    outcomes = run.outcomes
    links_s = 2 * 1e-4 + 32 * 4 / 1e9 + 64 / 1e9
    assert outcomes.first_s[0] == pytest.approx(0.01 + 32 * 0.0001 + links_s, abs=1e-7)
    assert outcomes.end_s[0] - outcomes.first_s[0] == pytest.approx(9 * (0.01 + 0.0001), abs=1e-7)
    assert list(outcomes.gaps_s) == pytest.approx([0.0101] * 9, abs=1e-7)


def test_a_lone_request_over_a_chain_takes_every_hop_and_every_link() -> None:
    machines = [
        machine("one", range(4), costs=LinearCosts(0.01, 0.0), site="a"),
        machine("two", range(4, 8), costs=LinearCosts(0.02, 0.0), site="b"),
    ]
    run = run_of(machines, asked(0.0, prompt=16, output=5))
    run.run()
    round_s = 0.01 + 0.02 + 2 * 0.02  # both steps, and there and back between the sites
    assert list(run.outcomes.gaps_s) == pytest.approx([round_s] * 4, abs=1e-3)


def test_a_prompt_flows_through_a_chain_in_slices() -> None:
    def first_s(step_tokens: int) -> float:
        limits = StepLimits(step_tokens=step_tokens)
        machines = [
            machine(name, span, costs=LinearCosts(0.0, 0.001), limits=limits)
            for name, span in (("one", range(4)), ("two", range(4, 8)))
        ]
        run = run_of(machines, asked(0.0, prompt=400, output=1))
        run.run()
        return run.outcomes.first_s[0]

    assert first_s(512) == pytest.approx(0.8, abs=0.01)
    assert first_s(50) == pytest.approx(0.45, abs=0.01)  # the second machine begins after the first slice


def test_the_router_spreads_requests_over_replicas() -> None:
    run = run_of(replicas(4), trace(0, 200, 50.0))
    run.run()
    steps = [worker.totals.step_sequences for worker in run.workers.values()]
    assert min(steps) > 0.5 * max(steps)


def test_two_runs_of_a_seed_are_the_same_and_another_seed_is_not() -> None:
    def digest(seed: int) -> str:
        run = run_of(swarm(0), trace(seed, 20, 4.0), seed=seed)
        run.run()
        return run.heap.digest()

    assert digest(1) == digest(1)
    assert digest(1) != digest(2)


@pytest.mark.parametrize("seed", range(4))
def test_every_request_ends_whatever_breaks(seed: int) -> None:
    run = run_of(swarm(seed, kv_blocks=60), trace(seed, 20, 2.0), seed=seed, faults=drawn_faults(seed))
    run.run()  # walks all books after every event, and at the end nothing may be held
    assert len(run.outcomes) == 20
    assert not run.outcomes.ended("failed")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4, 140))
def test_many_requests_end_whatever_breaks(seed: int) -> None:
    kv_blocks = int(np.random.default_rng(seed).choice([40, 80, 200]))
    requests = trace(seed, 200, 3.0, output=60)
    faults = drawn_faults(seed)
    run = run_of(swarm(seed, kv_blocks), requests, seed=seed, faults=faults, check="some", check_every=500)
    run.run()
    assert len(run.outcomes) == 200
    assert not run.outcomes.ended("failed")


def drawn_faults(seed: int) -> tuple[RunFault, ...]:
    """Faults of every kind at rates of the seed's."""
    rng = np.random.default_rng([seed, 1])
    rates = [
        FaultRate(
            kind=kind,
            per_hour=float(rng.choice([0, 200, 800])),
            mean_s=float(rng.choice([0.5, 4, 10])),
            strength=3.0 if kind == "slow_node" else 0.3,
        )
        for kind in FAULT_KINDS
    ]
    return draw_faults(seed, rates, [spec.name for spec in swarm(seed)], 60.0)


def test_a_crash_costs_a_replica_its_memory_and_no_request_its_answer() -> None:
    crash = RunFault(kind="crash", at_s=0.5, duration_s=2.0, machines=("replica-0",))
    calm = run_of(replicas(2), trace(0, 60, 40.0))
    calm.run()
    struck = run_of(replicas(2), trace(0, 60, 40.0), faults=[crash])
    struck.run()
    assert len(struck.outcomes.ended("finished")) == 60
    assert sum(struck.outcomes.retries) > 0 == sum(calm.outcomes.retries)
    assert max(struck.outcomes.end_s) > max(calm.outcomes.end_s)


def test_after_a_crash_in_a_chain_only_the_lost_hop_computes_again() -> None:
    machines = [
        machine("one", range(4), costs=LinearCosts(0.01, 0.0001)),
        machine("two", range(4, 8), costs=LinearCosts(0.01, 0.0001)),
        machine("spare", range(4, 8), costs=LinearCosts(0.05, 0.0001)),
    ]
    crash = RunFault(kind="crash", at_s=0.5, duration_s=60.0, machines=("two",))
    run = run_of(machines, asked(0.0, prompt=100, output=40), faults=[crash])
    run.run()
    tokens = {worker.name: worker.totals.step_tokens for worker in run.workers.values()}
    # Every position once, but for one that may have been under way; the last token is nobody's input.
    assert 139 <= tokens["one"] <= 140
    assert tokens["spare"] > 100
    assert tokens["two"] + tokens["spare"] > 139
    assert run.outcomes.output_tokens[0] == 40 and run.outcomes.retries[0] == 1


def test_a_short_pause_delays_and_a_long_one_moves_requests() -> None:
    def pause(duration_s: float) -> tuple[int, float]:
        fault = RunFault(kind="pause", at_s=0.05, duration_s=duration_s, machines=("replica-0",))
        run = run_of(replicas(1), asked(0.0), faults=[fault])
        run.run()
        return run.outcomes.retries[0], run.outcomes.widest_gap_s[0]

    assert pause(1.0) == (0, pytest.approx(1.0, abs=0.02))
    retries, gap_s = pause(5.0)
    assert retries == 1 and gap_s >= 5.0


def test_a_slow_machine_gets_less_and_a_slow_link_takes_longer() -> None:
    slow = RunFault(kind="slow_node", at_s=0.0, duration_s=100.0, machines=("replica-0",), strength=4.0)
    run = run_of(replicas(1), asked(1.0), faults=[slow])
    run.run()
    assert run.outcomes.gaps_s[0] == pytest.approx(4 * 0.0101)
    far = RunFault(kind="slow_link", at_s=0.0, duration_s=100.0, machines=("replica-0",), strength=0.5)
    run = run_of(replicas(1), asked(1.0), faults=[far])
    run.run()
    assert run.outcomes.first_s[0] > 1.0


def test_a_squeezed_machine_preempts_and_a_narrow_link_takes_longer_to_send() -> None:
    requests = asked(*[0.01 * number for number in range(20)], prompt=100, output=60)

    def preemptions(*faults: RunFault) -> int:
        run = run_of(replicas(1, kv_blocks=220), requests, faults=faults)
        run.run()
        assert len(run.outcomes.ended("finished")) == 20
        return next(iter(run.workers.values())).totals.preemptions

    squeeze = RunFault(kind="squeeze", at_s=0.1, duration_s=2.0, machines=("replica-0",), strength=0.8)
    assert preemptions(squeeze) > 0 == preemptions()
    narrow = RunFault(kind="narrow_link", at_s=0.0, duration_s=9.0, machines=("replica-0",), strength=1e6)
    run = run_of(replicas(1), asked(1.0), faults=[narrow])
    run.run()
    assert run.outcomes.first_s[0] > 32 * 4 * 1e6 / 1e9


def test_swizzled_machines_fall_in_one_order_and_rise_in_another() -> None:
    names = [f"m{number}" for number in range(9)]
    faults = swizzled("crash", names, 10.0, 1.0, np.random.default_rng(0))
    falls = [fault.machines[0] for fault in sorted(faults, key=lambda fault: fault.at_s)]
    rises = [fault.machines[0] for fault in sorted(faults, key=lambda fault: fault.at_s + fault.duration_s)]
    assert sorted(falls) == sorted(rises) == names
    assert len({tuple(falls), tuple(rises), tuple(names)}) == 3
    # All of them are down at once for a while.
    assert max(fault.at_s for fault in faults) < min(fault.at_s + fault.duration_s for fault in faults)


def test_what_is_cut_off_briefly_waits_and_for_long_is_given_up() -> None:
    def cut(duration_s: float) -> tuple[int, float]:
        fault = RunFault(kind="cut", at_s=0.05, duration_s=duration_s, machines=("replica-0",))
        run = run_of(replicas(1), asked(0.0), faults=[fault])
        run.run()
        return run.outcomes.retries[0], run.outcomes.end_s[0]

    retries, end_s = cut(1.0)
    assert retries == 0 and end_s > 1.0
    retries, end_s = cut(20.0)
    assert retries >= 1 and end_s > 20.0


def test_without_a_machine_a_request_waits_and_then_is_refused() -> None:
    gone = RunFault(kind="crash", at_s=0.0, duration_s=1000.0, machines=("replica-0",))
    run = run_of(replicas(1), asked(1.0), faults=[gone], patience_s=30.0)
    run.run()
    assert run.outcomes.ended("refused") == [0]
    assert "30 s" in next(iter(run.outcomes.reasons))


def test_a_request_that_fits_no_machine_is_refused_with_the_reason() -> None:
    run = run_of(replicas(1, kv_blocks=2), asked(0.0, prompt=100))
    run.run()
    assert run.outcomes.ended("refused") == [0]
    assert "KV blocks" in next(iter(run.outcomes.reasons))


def test_a_full_machine_sends_requests_elsewhere() -> None:
    limits = StepLimits(max_running_sequences=1, max_waiting=1)
    run = run_of(replicas(2, limits=limits), asked(*[0.001 * number for number in range(12)]))
    run.run()
    assert len(run.outcomes.ended("finished")) == 12


def test_who_waits_at_the_gateway_goes_in_order_of_arrival() -> None:
    requests = asked(*[0.001 * number for number in range(12)])
    run = run_of(replicas(2), requests, sessions_per_machine=1)
    run.run()
    assert list(run.outcomes.number) == list(range(12))


def test_memory_grows_with_requests_in_flight_and_hardly_with_those_that_are_over() -> None:
    def peak_bytes(count: int) -> int:
        requests = (
            TraceRequest(arrival_s=0.05 * number, prompt_tokens=64, output_tokens=2)
            for number in range(count)
        )
        tracemalloc.start()
        try:
            run = run_of(replicas(1), requests, check="end")  # pyright: ignore[reportArgumentType]  one after the other
            run.run()
            assert run.peak_in_flight < 5 and len(run.outcomes) == count
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    few, many = peak_bytes(300), peak_bytes(1500)
    assert (many - few) / 1200 < 300  # bytes a request: its row of numbers and its gap


def test_a_replay_stops_at_its_event_in_the_same_state() -> None:
    def until(event: int | None) -> tuple[str, int]:
        run = run_of(swarm(0), trace(5, 6, 4.0), seed=5, faults=drawn_faults(5))
        run.run(until_event=event)
        return run.heap.recent(), run.heap.events

    assert until(300) == until(300)
    assert until(300)[1] == 300
    assert until(300) != until(301)


def test_what_can_never_go_on_is_named() -> None:
    run = run_of(replicas(1), asked(0.0))
    run.run(until_event=3)
    for worker in run.workers.values():
        worker.between_steps = lambda action, what: None  # type: ignore[method-assign]
        worker.wake = lambda: None  # type: ignore[method-assign]  a lost wake-up
    with pytest.raises(Deadlock, match=r"1 requests will never end[\s\S]*r0 \(\d+ of 10 tokens\)"):
        run.run()


def test_a_leak_is_found_by_the_event_that_makes_it() -> None:
    run = run_of(replicas(1), asked(0.0))
    run.run(until_event=4)
    next(iter(run.workers.values())).pool.allocate(1)
    with pytest.raises((EventFailed, AssertionError), match="references"):
        run.run()


def test_any_mode_of_the_router_can_be_asked_for() -> None:
    for mode in ("load", "latency", "throughput", "exact"):
        run = run_of(swarm(1), trace(1, 4, 4.0), wish=RouteWish(mode=mode))
        run.run()
        assert len(run.outcomes.ended("finished")) == 4
