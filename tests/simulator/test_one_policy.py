"""What decides in a simulation is what decides live: nothing is written twice, and a bug in the live code shows."""

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest
from clusters import LinearCosts, machine, replicas, run_of, swarm, trace

from plait import kvcache, routing, scheduling, simulator
from plait.kvcache import KvBlockPool
from plait.routing import Router
from plait.scheduling import Grant, SchedulerView, StepPlan, rounds
from plait.scheduling.paged import PagedPolicy
from plait.simulator import ClusterRun, EventFailed, RunFault
from plait.simulator.data_path import DataPath
from plait.workload import TraceRequest

PACKAGE = Path(simulator.__file__).parent
DECIDING = {
    # What the live classes answer, whatever a second one would be called.
    "Scheduler": {"schedule", "complete"},
    "a policy": {"plan_step"},
    "KvBlockPool": {"allocate", "release"},
    "PrefixIndex": {"match", "publish"},
    "a planner": {"plan_placement"},
    "LendingAgent": {"on_message", "on_tick"},
    "LoanBook": {"reserve", "fill"},
}
DECISIONS = {"plan_step", "plan_resume", "choose_chain", "evict", "preempt", "schedule", "match", "allocate"}
"""Names under which something would be decided, if it were decided in the simulator."""


def classes() -> list[tuple[str, ast.ClassDef]]:
    return [
        (path.name, node)
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    ]


def test_the_simulator_defines_nothing_that_decides() -> None:
    live = {
        name
        for package in (scheduling, routing, kvcache)
        for name, each in vars(package).items()
        if inspect.isclass(each) or inspect.isfunction(each)
    }
    for file, node in classes():
        methods = {
            each.name for each in node.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)
        }
        assert node.name not in live, f"{file} defines a second {node.name}"
        for what, answers in DECIDING.items():
            assert not answers <= methods, f"{file}: {node.name} looks like {what}"
    for path in sorted(PACKAGE.rglob("*.py")):
        functions = {
            node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)
        }
        again = functions & (live | DECISIONS)
        assert not again, f"{path.name} defines {again} again"


def test_a_run_consists_of_the_live_classes() -> None:
    run = run_of(replicas(2), trace(0, 5, 20.0))
    run.run()
    for worker in run.workers.values():
        assert type(worker.scheduler) is scheduling.Scheduler
        assert type(worker.pool) is kvcache.KvBlockPool
        assert type(worker.spec.policy) is PagedPolicy
    assert type(run.gateway._router) is Router  # pyright: ignore[reportPrivateUsage]  that is the claim


def test_every_chain_and_every_step_is_the_answer_of_the_live_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a second router, policy or pool would be called: nothing but what these answer is carried out."""
    chosen: set[Any] = set()
    granted: set[Any] = set()
    allocated: set[tuple[int, int]] = set()
    choose, plan_step, allocate = Router.choose, PagedPolicy.plan_step, KvBlockPool.allocate
    start, mend, schedule = DataPath.start, DataPath.mend, scheduling.Scheduler.schedule

    def seen_choose(self: Router, *args: Any, **kwargs: Any) -> Any:
        routed = choose(self, *args, **kwargs)
        chosen.update(routed.chain)
        return routed

    def seen_plan_step(self: PagedPolicy, view: SchedulerView) -> StepPlan:
        plan = plan_step(self, view)
        granted.clear()
        granted.update((grant.request.id, grant.tokens) for grant in plan.grants)
        return plan

    def seen_allocate(self: KvBlockPool, kv_blocks: int) -> list[int]:
        taken = allocate(self, kv_blocks)
        allocated.update((id(self), kv_block) for kv_block in taken)
        return taken

    def seen_schedule(self: Any) -> Any:
        step = schedule(self)
        for chunk in step.chunks:
            assert (chunk.request_id, chunk.tokens) in granted
            assert {(id(self._pool), kv_block) for kv_block in chunk.kv_blocks} <= allocated
        return step

    def seen_start(self: Any, flight: Any, workers: Any) -> None:
        assert set(flight.chain) <= chosen
        start(self, flight, workers)

    def seen_mend(self: Any, flight: Any, hops: Any) -> None:
        assert set(flight.chain) <= chosen
        mend(self, flight, hops)

    monkeypatch.setattr(Router, "choose", seen_choose)
    monkeypatch.setattr(PagedPolicy, "plan_step", seen_plan_step)
    monkeypatch.setattr(KvBlockPool, "allocate", seen_allocate)
    monkeypatch.setattr(scheduling.Scheduler, "schedule", seen_schedule)
    monkeypatch.setattr(DataPath, "start", seen_start)
    monkeypatch.setattr(DataPath, "mend", seen_mend)
    crash = RunFault(kind="crash", at_s=1.0, duration_s=20.0, machines=("m0", "m1", "m2", "m8"))
    run = run_of(swarm(1, kv_blocks=60), trace(0, 30, 8.0), faults=[crash])
    run.run()
    assert len(run.outcomes.ended("finished")) == 30 and chosen and allocated
    assert sum(run.outcomes.retries) > 0


def times_s(run: ClusterRun) -> list[float]:
    run.run()
    return list(run.outcomes.end_s)


def test_a_bug_planted_in_the_live_policy_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    right_s = times_s(run_of(replicas(2), trace(0, 60, 60.0)))
    plan_step = PagedPolicy.plan_step

    def forgetful(self: PagedPolicy, view: SchedulerView) -> StepPlan:
        plan = plan_step(self, view)
        grants: list[Grant] = list(plan.grants)
        admitted = {admission.request.id for admission in plan.admissions}
        while len(grants) > 2 and grants[-1].request.id not in admitted:
            grants.pop()  # decodes of all but the first two wait
        return StepPlan(grants, victims=plan.victims, admissions=plan.admissions)

    monkeypatch.setattr(PagedPolicy, "plan_step", forgetful)
    wrong_s = times_s(run_of(replicas(2), trace(0, 60, 60.0)))
    assert sum(wrong_s) > 1.1 * sum(right_s)


def test_a_bug_planted_in_the_live_router_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    right_s = times_s(run_of(replicas(4), trace(0, 60, 100.0)))
    choose = Router.choose
    first: list[Any] = []

    def stubborn(self: Router, *args: Any, **kwargs: Any) -> Any:
        first.append(choose(self, *args, **kwargs))
        return first[0]

    monkeypatch.setattr(Router, "choose", stubborn)
    wrong_s = times_s(run_of(replicas(4), trace(0, 60, 100.0)))
    assert sum(wrong_s) > 1.05 * sum(right_s)


def test_a_bug_planted_in_the_live_cache_is_found_by_an_invariant(monkeypatch: pytest.MonkeyPatch) -> None:
    release = KvBlockPool.release

    def leaky(self: KvBlockPool, kv_blocks: Any) -> None:
        release(self, list(kv_blocks)[1:])

    monkeypatch.setattr(KvBlockPool, "release", leaky)
    with pytest.raises((EventFailed, AssertionError), match="references"):
        run_of(replicas(1), trace(0, 10, 20.0)).run()


def mean_batch_of_two_over_a_chain() -> float:
    machines = [
        machine(name, blocks, costs=LinearCosts(0.04, 0.0001))
        for name, blocks in (("one", range(4)), ("two", range(4, 8)))
    ]
    requests = [TraceRequest(arrival_s=at_s, prompt_tokens=20, output_tokens=40) for at_s in (0.0, 0.61)]
    run = run_of(machines, requests)
    run.run()
    totals = next(iter(run.workers.values())).totals
    return totals.step_sequences / totals.steps


def test_a_bug_planted_in_the_live_decision_to_wait_for_sessions_shows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert mean_batch_of_two_over_a_chain() > 1.5

    def never(*_: Any, **__: Any) -> None:
        return None

    monkeypatch.setattr(rounds, "wait_until_s", never)
    assert mean_batch_of_two_over_a_chain() == 1.0


def test_policies_differ_as_they_do_live() -> None:
    """Static batching makes a short answer wait for the batch before it, ORCA's reservation for memory."""
    requests = [TraceRequest(arrival_s=0.0, prompt_tokens=100, output_tokens=400)]
    requests += [
        TraceRequest(arrival_s=0.1 + 0.01 * n, prompt_tokens=20, output_tokens=10) for n in range(20)
    ]
    mean_s: dict[str, float] = {}
    for policy in ("static", "orca", "paged"):
        run = run_of([machine("one", policy=policy, kv_blocks=38)], requests)
        run.run()
        short = [
            end_s
            for end_s, tokens in zip(run.outcomes.end_s, run.outcomes.output_tokens, strict=True)
            if tokens == 10
        ]
        mean_s[policy] = sum(short) / len(short)
    assert mean_s["paged"] < mean_s["orca"] < mean_s["static"]


def test_who_does_not_know_the_length_of_answers_reserves_more() -> None:
    requests = [TraceRequest(arrival_s=0.01 * n, prompt_tokens=50, output_tokens=50) for n in range(20)]
    batch: dict[str, float] = {}
    for asks in ("answer", "power-of-two", "context"):
        one = machine("one", policy="orca", kv_blocks=60)
        run = run_of([one], requests, asks=asks, max_model_tokens=800)
        run.run()
        totals = next(iter(run.workers.values())).totals
        batch[asks] = totals.step_sequences / totals.steps
    assert batch["context"] <= 1.0 < 4.0 < batch["power-of-two"] < batch["answer"]
