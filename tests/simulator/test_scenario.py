import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from clusters import LinearCosts, replicas, run_of, trace

from plait import simulator
from plait.costs import StepWork
from plait.errors import BadSetup, MissingCost
from plait.metrics import Objectives
from plait.simulator import (
    Outcomes,
    Timeline,
    attained,
    latency_samples,
    load_scenario,
    objectives_of,
    parse_scenario,
    report_of,
    run_of_scenario,
)

EXAMPLES = Path(simulator.__file__).parent / "scenarios"
SMALL = """
model: opt-13b
machines:
  - {name: replica, count: 2, device: a100-40gb}
workload: {requests: 30, lengths: sharegpt-like, rate_per_s: 5}
objectives: {ttft_s: 1.0, tpot_s: 0.1}
"""


def report(text: str, folder: Path = EXAMPLES) -> dict[str, Any]:
    scenario = parse_scenario(text, "test.yaml")
    run = run_of_scenario(scenario, folder)
    run.run()
    return report_of(run, objectives_of(scenario))


def test_a_scenario_becomes_a_report_in_the_words_of_serving() -> None:
    found = report(SMALL)
    assert found["requests"]["finished"] == found["requests"]["offered"] == 30
    for name in ("ttft", "itl", "tpot", "e2e", "normalised"):
        statistics = found["latency_s"][name]
        assert statistics["p50"]["low"] <= statistics["p50"]["value"] <= statistics["p99"]["value"]
        assert statistics["mean"]["low"] < statistics["mean"]["high"]
    # A step of OPT-13B reads 25.7 GB of weights at 80 % of 1,555 GB/s, and some keys and values.
    assert 0.0207 < found["latency_s"]["itl"]["p50"]["value"] < 0.026
    json.dumps(found)


def test_the_same_scenario_gives_the_same_report_in_other_processes() -> None:
    def run(hash_seed: str, seed: str) -> dict[str, Any]:
        program = (
            "import json, sys; from pathlib import Path; from plait.simulator import *\n"
            "scenario = load_scenario(Path(sys.argv[1])).model_copy(update={'seed': int(sys.argv[2])})\n"
            "workload = scenario.workload.model_copy(update={'requests': 12})\n"
            "scenario = scenario.model_copy(update={'workload': workload})\n"
            "run = run_of_scenario(scenario, Path('.')); run.run()\n"
            "print(json.dumps(report_of(run, objectives_of(scenario))))"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, str(EXAMPLES / "swarm.yaml"), seed],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            check=True,
            timeout=240,
        )
        return json.loads(done.stdout)

    first, second, other = run("1", "0"), run("4711", "0"), run("1", "1")
    assert first == second
    assert first["digest"] != other["digest"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("device: a100-40gb", "devise: a100-40gb"), r"'machines\.0\.devise'; did you mean 'device'"),
        (("device: a100-40gb", "device: a200"), "no device called 'a200'"),
        (("opt-13b", "opt-14b"), "no model shape is called 'opt-14b'"),
        (("rate_per_s: 5", "rate_per_s: -5"), r"workload\.rate_per_s is -5"),
        (("rate_per_s: 5", "burstiness: 1"), "workload needs a trace, or requests and rate_per_s"),
        (("sharegpt-like", "sharegpt"), "no mix of lengths is called 'sharegpt'"),
        (("device: a100-40gb", "scheduling: paged"), "no costs; give one of device"),
        (
            ("device: a100-40gb", "device: a100-40gb, scheduling: fifo"),
            "'fifo'; choose one of static, orca, paged",
        ),
        (("device: a100-40gb", "device: t4"), "no room for a single KV block"),
        (("device: a100-40gb", "device: a100-40gb, blocks: '0:41'"), "no span of a model of 40 blocks"),
        (
            ("device: a100-40gb", "profile: nowhere.json"),
            "'nowhere.json' of machine 'replica' cannot be read|nowhere",
        ),
        (("device: a100-40gb", "linear: {per_step_s: 0.01}"), "no kv_memory"),
        (("model:", "routing: {mode: fastest}\nmodel:"), "routing.mode is 'fastest'"),
        (
            ("model:", "faults: [{kind: crash, at_s: 1, duration_s: 1, machines: [x]}]\nmodel:"),
            "'x', which is no",
        ),
        (("model: opt-13b", ""), "the field 'model' is missing"),
        (("model: opt-13b", "model: " + "[" * 5000), "nested deeper"),
        (("count: 2", "count: 0"), r"machines\.0\.count is 0"),
        (("count: 2", "count: 20000"), r"machines\.0\.count is 20000"),
        (
            ("{name: replica", "{name: replica-0, device: t4}\n  - {name: replica"),
            "two are called 'replica-0'",
        ),
        (("replica, count: 2", "gateway"), "'gateway' is where requests come in"),
        (("device: a100-40gb", "linear: {per_step_s: 0}, kv_memory: 8GiB"), "take no time are no costs"),
        (("device: a100-40gb", "linear: {per_step_s: 1.0e+300}, kv_memory: 8GiB"), "never ends"),
        (("device: a100-40gb", "device: a100-40gb, kv_memory: 9000000TiB"), "KV blocks together"),
        (("device: a100-40gb", "device: a100-40gb, blocks: '0:20'"), "no machine holds block 20"),
        (("rate_per_s: 5", "rate_per_s: 1.0e-300"), "never ends"),
        (("rate_per_s: 5", "rate_per_s: .inf"), "finite"),
        (("requests: 30", "requests: 1000000000"), r"workload\.requests is 1000000000"),
        (
            ("model:", "random_faults: [{kind: pause, per_hour: 1.0e+12, mean_s: 1}]\nmodel:"),
            "give a lower rate",
        ),
        (("model:", "seed: -1\nmodel:"), "seed is -1"),
        (("count: 2", "count: two"), r"machines\.0\.count is 'two'"),
    ],
)
def test_what_is_wrong_with_a_scenario_is_said_with_file_field_and_fix(
    change: tuple[str, str], message: str
) -> None:
    with pytest.raises(BadSetup, match=message):
        report(SMALL.replace(*change))


def test_missing_costs_stop_a_run_with_the_name_of_what_is_missing() -> None:
    text = SMALL.replace("device: a100-40gb", "device: a100-40gb, weights: int3")
    with pytest.raises(BadSetup, match="int3"):
        report(text)


def test_a_cost_that_turns_out_to_be_missing_ends_the_run_with_its_name() -> None:
    class Failing(LinearCosts):
        def step_s(self, work: StepWork) -> float:
            if work.features.tokens == 2:
                raise MissingCost("a step of 2 tokens of 'opt-13b' was not measured")
            return super().step_s(work)

    run = run_of(replicas(1, costs=Failing()), trace(0, 10, 20.0))
    with pytest.raises(MissingCost, match="2 tokens of 'opt-13b'"):
        run.run()


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_embedded_scenarios_run(example: Path) -> None:
    scenario = load_scenario(example)
    scenario = scenario.model_copy(update={"workload": scenario.workload.model_copy(update={"requests": 25})})
    run = run_of_scenario(scenario, example.parent)
    run.run()
    assert len(run.outcomes.ended("finished")) == 25


def test_more_load_is_more_latency_and_a_faster_device_less() -> None:
    base = report(SMALL)["latency_s"]["e2e"]["p50"]["value"]
    loaded = report(SMALL.replace("rate_per_s: 5", "rate_per_s: 500"))["latency_s"]["e2e"]["p50"]["value"]
    faster = report(SMALL.replace("a100-40gb", "h200"))["latency_s"]["e2e"]["p50"]["value"]
    assert faster < base < loaded


def test_conversations_find_their_history_in_the_cache() -> None:
    talk = "conversations: {tenants: 2, instruction_tokens: 512, mean_turns: 3, think_s: 5}, "
    alone = report(SMALL.replace("count: 2", "count: 1"))
    talking = report(SMALL.replace("count: 2", "count: 1").replace("requests:", f"{talk}requests:"))
    assert alone["machines"]["replica"]["cache_hit_fraction"] == 0.0
    assert talking["machines"]["replica"]["cache_hit_fraction"] > 0.4


def test_a_request_beyond_the_context_of_the_model_is_refused(tmp_path: Path) -> None:
    line = '{"arrival_s": 0, "prompt_tokens": 2000, "output_tokens": %d}\n'
    (tmp_path / "trace.jsonl").write_text(line % 48 + line % 49)
    text = SMALL.replace("requests: 30, lengths: sharegpt-like, rate_per_s: 5", "trace: trace.jsonl")
    found = report(text, tmp_path)["requests"]
    assert (found["finished"], found["refused"]) == (1, 1)
    assert "2048" in next(iter(found["reasons"]))


def test_a_model_is_taken_further_than_it_was_made_for_if_the_scenario_says_so(tmp_path: Path) -> None:
    (tmp_path / "trace.jsonl").write_text('{"arrival_s": 0, "prompt_tokens": 4000, "output_tokens": 90}\n')
    text = SMALL.replace("requests: 30, lengths: sharegpt-like, rate_per_s: 5", "trace: trace.jsonl")
    assert report(text, tmp_path)["requests"]["refused"] == 1
    assert report(f"context_tokens: 4090\n{text}", tmp_path)["requests"]["finished"] == 1


def test_what_clients_ask_room_for_is_reserved(tmp_path: Path) -> None:
    """All at once, 30 requests of 100 and 65 tokens, in a cache of 2,048: so many run side by side as were promised."""
    line = '{"arrival_s": 0, "prompt_tokens": 100, "output_tokens": 65}\n'
    (tmp_path / "trace.jsonl").write_text(line * 30)
    text = """
model: opt-13b
machines: [{name: one, linear: {per_step_s: 0.01}, kv_memory: %d, scheduling: orca}]
workload: {trace: trace.jsonl, asks: %s}
"""
    batches = {
        asks: report(text % (2048 * 2 * 40 * 5120 * 2, asks), tmp_path)["machines"]["one"]["mean_batch"]
        for asks in ("answer", "power-of-two", "context")
    }
    assert batches == pytest.approx({"answer": 10, "power-of-two": 7.5, "context": 1}, rel=0.1)


def test_a_published_trace_is_served(tmp_path: Path) -> None:
    lines = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    lines += [f"2023-11-16 18:15:{second:02d}.0000000,{100 + second},5" for second in range(20)]
    (tmp_path / "azure.csv").write_text("\n".join(lines))
    text = SMALL.replace(
        "requests: 30, lengths: sharegpt-like, rate_per_s: 5", "trace: azure.csv, format: azure"
    )
    found = report(text, tmp_path)
    assert found["requests"]["finished"] == 20


def outcomes_by_hand() -> Outcomes:
    """Four requests: one token; refused; moved to another machine; a stream that stalls."""
    outcomes = Outcomes()
    common = {"prompt_tokens": 10, "retries": 0}
    outcomes.add(
        number=0,
        arrival_s=0.0,
        output_tokens=1,
        first_s=0.5,
        end_s=0.5,
        widest_gap_s=0.0,
        ending="finished",
        **common,
    )
    outcomes.add(
        number=1,
        arrival_s=0.0,
        output_tokens=0,
        first_s=0.0,
        end_s=9.0,
        widest_gap_s=0.0,
        ending="refused",
        **common,
    )
    outcomes.add(
        number=2,
        arrival_s=1.0,
        output_tokens=5,
        first_s=0.4,
        end_s=1.2,
        widest_gap_s=0.5,
        ending="finished",
        prompt_tokens=10,
        retries=1,
    )
    outcomes.gaps_s.extend([0.1, 0.5, 0.1, 0.1])
    outcomes.add(
        number=3,
        arrival_s=2.0,
        output_tokens=3,
        first_s=0.2,
        end_s=3.3,
        widest_gap_s=3.0,
        ending="finished",
        **common,
    )
    outcomes.gaps_s.extend([0.1, 3.0])
    return outcomes


def test_metrics_of_an_example_computed_by_hand() -> None:
    samples = latency_samples(outcomes_by_hand())
    assert samples["ttft"].tolist() == pytest.approx([0.5, 0.4, 0.2])
    assert samples["tpot"].tolist() == pytest.approx([0.2, 1.55])  # none for a single token
    assert samples["e2e"].tolist() == pytest.approx([0.5, 1.2, 3.3])
    assert samples["normalised"].tolist() == pytest.approx([0.5, 0.24, 1.1])
    assert sorted(samples["itl"].tolist()) == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.5, 3.0])

    def good(**limits: float) -> list[bool]:
        return attained(outcomes_by_hand(), Objectives(**limits)).tolist()

    assert good() == [True, False, True, True]  # who was refused is never good
    assert good(ttft_s=0.45) == [False, False, True, True]
    assert good(tpot_s=0.2001) == [True, False, True, False]
    assert good(widest_gap_s=1.0) == [True, False, True, False]
    assert good(ttft_s=0.45, widest_gap_s=1.0) == [False, False, True, False]


def test_a_timeline_is_a_chrome_trace_of_steps_and_requests(tmp_path: Path) -> None:
    timeline = Timeline()
    run = run_of(replicas(2), trace(0, 10, 20.0), timeline=timeline)
    run.run()
    timeline.write(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    steps = [event for event in events if event.get("cat") == "step"]
    assert len(steps) == sum(worker.totals.steps for worker in run.workers.values())
    for machine in {event["tid"] for event in steps}:
        mine = sorted((event["ts"], event["dur"]) for event in steps if event["tid"] == machine)
        assert all(ts + dur <= after + 1e-6 for (ts, dur), (after, _) in itertools.pairwise(mine))
    begun = [event for event in events if event["ph"] == "b"]
    assert len(begun) == 10 == len([event for event in events if event["ph"] == "e"])
