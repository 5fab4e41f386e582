"""Machines that lend each other KV memory, simulated by the agent that lends live: signs, faults, planted bugs."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from clusters import FAR, NEAR, LinearCosts, machine, run_of, trace

from plait.errors import BadSetup
from plait.ids import PeerId
from plait.kvcache import (
    BlockLoans,
    LendingAgent,
    LendingOptions,
    LendingRules,
    LentBlock,
    LoanBook,
    LoanTerms,
)
from plait.metrics import Objectives
from plait.scheduling import StepLimits
from plait.simulator import (
    ClusterRun,
    EventFailed,
    FaultRate,
    LendingSpec,
    LinkSpec,
    MachineSpec,
    NetworkSpec,
    RunFault,
    draw_faults,
    lending_of,
    longest_context_tokens,
    parse_scenario,
    report_of,
    run_of_scenario,
)
from plait.workload import TraceRequest

LONG = TraceRequest(arrival_s=0.0, prompt_tokens=1500, output_tokens=60)
ATTENTION = LinearCosts(per_step_s=0.01, per_token_s=1e-5, per_context_token_s=1e-6, kv_bytes_per_token=1000)


def lenders(
    count: int = 3,
    *,
    kv_blocks: int = 40,
    policy: str = "pull",
    moved_tokens: int = 64,
    knows_lengths: bool = False,
    costs: LinearCosts = ATTENTION,
) -> list[MachineSpec]:
    """Machines of 640 tokens each, by default, that lend up to 600 of them."""
    lendable = kv_blocks - 2
    spec = LendingSpec(
        options=LendingOptions(
            policy=policy,  # pyright: ignore[reportArgumentType]
            moved_tokens_per_step=moved_tokens,
            heartbeat_s=0.1,
            answer_within_s=0.5,
            manage_s=0.3,
            rules=LendingRules(small_batch=32),
        ),
        terms=LoanTerms(lendable_blocks=lendable, keep_free_blocks=1, lease_s=2.0, recall_s=2.0),
        query_bytes_per_token=4096,
        part_bytes_per_token=8192,
        copy_bytes_per_s=1e9,
        knows_lengths=knows_lengths,
    )
    limits = StepLimits(step_tokens=256, borrowable_blocks=lendable * (count - 1))
    return [
        replace(machine(f"m{number}", limits=limits, kv_blocks=kv_blocks, costs=costs), lending=spec)
        for number in range(count)
    ]


def alone(count: int = 3, *, kv_blocks: int = 40) -> list[MachineSpec]:
    limits = StepLimits(step_tokens=256)
    return [
        machine(f"m{number}", limits=limits, kv_blocks=kv_blocks, costs=ATTENTION) for number in range(count)
    ]


def finished(run: ClusterRun) -> ClusterRun:
    run.run()
    return run


def last_s(run: ClusterRun) -> float:
    return max(a + e for a, e in zip(run.outcomes.arrival_s, run.outcomes.end_s, strict=True))


def test_a_request_longer_than_a_machine_completes_only_by_lending() -> None:
    refused = finished(run_of(alone(), [LONG])).outcomes
    assert len(refused.ended("refused")) == 1
    for policy in ("pull", "plan"):
        run = finished(run_of(lenders(policy=policy), [LONG]))
        assert longest_context_tokens(run.outcomes) == 1560
        lending = lending_of(run)
        assert lending is not None and lending["most_borrowed_blocks"] * 16 >= 1560 - 640
        assert lending["query_bytes"] > 0 and lending["waited_s"] > 0


def test_crowded_machines_serve_more_where_others_have_room() -> None:
    """Long and short ones side by side: those that wait behind a long one run once part of it has left."""
    requests = [TraceRequest(arrival_s=0.0, prompt_tokens=560, output_tokens=60)] * 2
    requests += [TraceRequest(arrival_s=0.05, prompt_tokens=20, output_tokens=100)] * 12
    seconds = {
        "off": last_s(finished(run_of(alone(4), requests))),
        "pull": last_s(finished(run_of(lenders(4), requests))),
    }
    assert seconds["pull"] < seconds["off"]


def test_equal_requests_that_fit_gain_nothing_and_lose_nothing() -> None:
    requests = trace(0, 40, 30.0, prompt=64, output=30)
    off, pull = (last_s(finished(run_of(machines, requests))) for machines in (alone(), lenders()))
    assert pull == pytest.approx(off, rel=0.02)


def test_the_farther_the_memory_the_slower() -> None:
    def seconds(link: LinkSpec) -> float:
        network = NetworkSpec(within=link, between=link)
        return last_s(finished(run_of(lenders(), [LONG], network=network, check="end")))

    near_s = seconds(NEAR)
    assert seconds(replace(NEAR, one_way_s=1e-3)) > near_s  # two delays for each of eight layers and steps
    assert seconds(FAR) > 2 * near_s


def test_lending_costs_the_lender_time() -> None:
    """A machine that attends for others takes longer for its own."""
    own = TraceRequest(arrival_s=0.5, prompt_tokens=10, output_tokens=100)
    costly = replace_costs(ATTENTION, per_context_token_s=1e-5)

    def gap_s(requests: Sequence[TraceRequest]) -> float:
        run = finished(run_of(lenders(2, kv_blocks=60, costs=costly), requests))
        row = run.outcomes.prompt_tokens.index(10)
        return (run.outcomes.end_s[row] - run.outcomes.first_s[row]) / 99

    assert gap_s([replace(LONG, prompt_tokens=1300), own]) > 1.1 * gap_s([own])


def replace_costs(costs: LinearCosts, **changes: float) -> LinearCosts:
    return replace(costs, **changes)  # pyright: ignore[reportArgumentType]


def faulted(seed: int, policy: str = "pull", check: str = "event") -> ClusterRun:
    kinds = ("crash", "pause", "slow_node", "slow_link", "cut", "partition")
    machines = lenders(4, policy=policy)
    rates = [FaultRate(kind=kind, per_hour=1200.0, mean_s=2.0, strength=0.01) for kind in kinds]
    rates = [replace(rate, strength=3.0) if rate.kind == "slow_node" else rate for rate in rates]
    faults = draw_faults(seed, rates, [each.name for each in machines], 8.0)
    rng = np.random.default_rng(seed)
    requests = [
        TraceRequest(
            arrival_s=0.2 * number,
            prompt_tokens=int(rng.integers(10, 1000)),
            output_tokens=int(rng.integers(1, 60)),
        )
        for number in range(30)
    ]
    return run_of(machines, requests, seed=seed, faults=faults, loan_wait_s=20.0, check=check)


@pytest.mark.parametrize("policy", ["pull", "plan"])
@pytest.mark.parametrize("seed", range(4))
def test_whatever_breaks_books_agree_and_nothing_stays_lent(seed: int, policy: str) -> None:
    """All books are walked after every event; at the end nothing is held, lent or borrowed (`ClusterRun.check`)."""
    run = finished(faulted(seed, policy))
    assert len(run.outcomes) == 30
    lending = lending_of(run)
    assert lending is not None and lending["blocks_moved_out"] > 0


def test_a_creditor_that_crashes_makes_its_debtor_compute_again() -> None:
    [debtor] = {name for name in ("m0", "m1", "m2") if name in served_by(run_of(lenders(), [LONG]))}
    creditors = [name for name in ("m0", "m1", "m2") if name != debtor]
    crash = RunFault(kind="crash", at_s=0.5, duration_s=1.0, machines=(creditors[0],))
    run = finished(run_of(lenders(), [LONG], faults=[crash]))
    lending = lending_of(run)
    assert lending is not None and lending["blocks_lost"] > 0
    assert longest_context_tokens(run.outcomes) == 1560 and run.outcomes.retries[0] == 0
    assert last_s(run) > last_s(finished(run_of(lenders(), [LONG])))


def served_by(run: ClusterRun) -> set[str]:
    run.run()
    return {worker.name for worker in run.workers.values() if worker.totals.steps}


def test_the_first_machine_manages_and_may_crash() -> None:
    manager = min(lenders(4), key=lambda each: each.peer).name
    crash = RunFault(kind="crash", at_s=0.3, duration_s=3.0, machines=(manager,))
    run = finished(run_of(lenders(4), [replace(LONG, prompt_tokens=1000)], faults=[crash]))
    assert len(run.outcomes.ended("finished")) == 1


def test_who_gets_no_loan_fails_at_last() -> None:
    """Two requests that together are longer than all memory: one waits, and does not wait for ever."""
    much = replace(LONG, prompt_tokens=1700, output_tokens=100)
    run = finished(
        run_of(lenders(3), [replace(LONG, prompt_tokens=10, output_tokens=2000), much], loan_wait_s=5.0)
    )
    assert len(run.outcomes) == 2


def test_equal_seeds_equal_runs() -> None:
    digests = [finished(faulted(seed, check="end")).heap.digest() for seed in (1, 1, 2)]
    assert digests[0] == digests[1] != digests[2]


def test_an_oracle_borrows_before_it_is_short() -> None:
    growing = TraceRequest(arrival_s=0.0, prompt_tokens=500, output_tokens=400)

    def first_loan_s(*, knows_lengths: bool) -> float:
        run = run_of(lenders(knows_lengths=knows_lengths), [growing])
        while not any(lender.agent.loans.debts.borrowed_blocks for lender in run.lending.lenders):  # pyright: ignore[reportOptionalMemberAccess]
            run.heap.step()
        return run.heap.now_s

    assert first_loan_s(knows_lengths=True) < 0.5 * first_loan_s(knows_lengths=False)


def test_a_run_consists_of_the_live_agents() -> None:
    run = run_of(lenders(), [LONG])
    assert run.lending is not None
    for lender in run.lending.lenders:
        assert type(lender.agent) is LendingAgent and type(lender.agent.loans) is BlockLoans


def test_a_creditor_that_lends_a_block_twice_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    take_back = LoanBook._take_back  # pyright: ignore[reportPrivateUsage]

    def forgetful(self: LoanBook, kv_block: int) -> None:
        take_back(self, kv_block)
        self._generations[kv_block] -= 1  # pyright: ignore[reportPrivateUsage]

    monkeypatch.setattr(LoanBook, "_take_back", forgetful)
    with pytest.raises(EventFailed, match="in the books of both"):
        for seed in range(6, 30):
            finished(faulted(seed))


def test_a_creditor_that_never_takes_back_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def deaf(self: LoanBook, debtor: PeerId, blocks: Iterable[LentBlock]) -> None:
        list(blocks)

    monkeypatch.setattr(LoanBook, "release", deaf)

    def content(self: LoanBook, debtor: PeerId, blocks: object, settled: int, now_s: float) -> tuple[()]:
        return ()

    def patient(self: LoanBook, now_s: float) -> int:
        return 0

    monkeypatch.setattr(LoanBook, "renew", content)
    monkeypatch.setattr(LoanBook, "expire", patient)
    with pytest.raises(AssertionError, match=r"leaked|still lent"):
        finished(run_of(lenders(), [LONG], check="end"))


SCENARIO = """
model: llama-2-7b
context_tokens: 100000
machines:
  - {{name: gpu, count: 3, device: a100-80gb, kv_memory: 4GiB, block_tokens: {block_tokens}}}
  - {{name: other, device: a100-80gb, kv_memory: 4GiB, block_tokens: 64}}
workload: {{requests: 3, lengths: equal, rate_per_s: 2}}
lending: {{policy: {policy}}}
run: {{check: end}}
"""


def test_a_scenario_says_who_lends_and_its_report_what_was_lent(tmp_path: object) -> None:
    from pathlib import Path

    for policy, lends in (("off", False), ("plan", True)):
        run = run_of_scenario(
            parse_scenario(SCENARIO.format(policy=policy, block_tokens=64), "here"), Path(".")
        )
        run.run()
        report = report_of(run, Objectives())
        assert (report["lending"] is not None) == lends
        assert report["longest_context_tokens"] > 0
    with pytest.raises(BadSetup, match="same block_tokens"):
        run_of_scenario(parse_scenario(SCENARIO.format(policy="pull", block_tokens=16), "here"), Path("."))
