"""Signs of published claims about batching and memory, on small traces at the scale of their papers.

Sizes are measured by bench/comparison.py. What is claimed of lending is tested beside it.
"""

from pathlib import Path

import numpy as np
import pytest

from plait.costs import ASSUMED, Formats, RooflineCosts, SpanShape, StepWork, device_named
from plait.ids import RequestId
from plait.kvcache import KvBlockPool
from plait.model import published_spec
from plait.scheduling import NewRequest, Scheduler, StepLimits, policy_named
from plait.simulator import latency_samples, parse_scenario, run_of_scenario
from plait.workload import TraceRequest, format_trace, length_mix_named, poisson_arrivals_s

ONE_GPU = "device: a100-40gb"
SCENARIO = """
model: {model}
machines:
  - {{name: server, {gpus}, host_s: 0.002, scheduling: {scheduling}, block_tokens: {block_tokens}}}
workload: {{{requests}, asks: {asks}}}
run: {{check: end, patience_s: 1.0e+9}}
"""


def served(
    scheduling: str,
    asks: str,
    lengths: str = "sharegpt-like",
    rate: float = 1.5,
    *,
    requests: int = 80,
    model: str = "opt-13b",
    gpus: str = ONE_GPU,
    block_tokens: int = 16,
    folder: Path | None = None,
) -> tuple[float, float, float]:
    """Mean normalised latency, mean batch, and the useful fraction of the memory held.

    Requests are those of trace.jsonl where a folder is given.
    """
    drawn = f"requests: {requests}, lengths: {lengths}, rate_per_s: {rate}"
    text = SCENARIO.format(
        model=model,
        gpus=gpus,
        scheduling=scheduling,
        asks=asks,
        requests="trace: trace.jsonl" if folder else drawn,
        block_tokens=block_tokens,
    )
    run = run_of_scenario(parse_scenario(text, "claims"), folder or Path("."))
    run.run()
    totals = next(iter(run.workers.values())).totals
    return (
        float(latency_samples(run.outcomes)["normalised"].mean()),
        totals.step_sequences / totals.steps,
        totals.useful_kv_fraction_sum / totals.usage_samples,
    )


@pytest.fixture(scope="module")
def conversations() -> dict[str, tuple[float, float, float]]:
    return {
        "static": served("static", "answer"),
        "orca, oracle": served("orca", "answer"),
        "orca, pow2": served("orca", "power-of-two"),
        "orca, max": served("orca", "context"),
        "paged": served("paged", "answer"),
    }


def test_iterations_beat_batches_of_requests(conversations: dict[str, tuple[float, float, float]]) -> None:
    """Yu et al. 2022, section 6: on the same trace ORCA's latency is a fraction of request-level batching's."""
    assert conversations["orca, oracle"][0] < 0.5 * conversations["static"][0]


def test_of_a_reservation_of_the_maximum_little_is_useful(
    conversations: dict[str, tuple[float, float, float]],
) -> None:
    """Kwon et al. 2023, section 1: 20 to 38 % of the memory held useful tokens; with pages 96 %."""
    assert 0.15 < conversations["orca, max"][2] < 0.4
    assert conversations["paged"][2] > 0.95
    useful = [conversations[policy][2] for policy in ("orca, max", "orca, pow2", "orca, oracle", "paged")]
    assert useful == sorted(useful)


def test_pages_make_batches_larger_and_latency_lower(
    conversations: dict[str, tuple[float, float, float]],
) -> None:
    """Kwon et al. 2023, section 6.2: paged before ORCA with oracle, with powers of two, with the maximum."""
    latency = {policy: found[0] for policy, found in conversations.items()}
    assert latency["paged"] < latency["orca, oracle"] < latency["orca, pow2"] < latency["orca, max"]
    assert conversations["paged"][1] > 1.5 * conversations["orca, max"][1]


def test_where_all_lengths_are_equal_batches_of_requests_lose_less() -> None:
    """Yu et al. 2022, section 6: the gap comes from unequal lengths."""
    unequal = served("static", "answer", "uniform", 4.0)[0] / served("orca", "answer", "uniform", 4.0)[0]
    equal = served("static", "answer", "equal", 4.0)[0] / served("orca", "answer", "equal", 4.0)[0]
    assert unequal > equal


def test_where_memory_suffices_pages_gain_nothing() -> None:
    """Kwon et al. 2023, section 6.2: of 175 B parameters with Alpaca's lengths, arithmetic is what is short."""
    latency: dict[str, float] = {}
    batch: dict[str, float] = {}
    for policy in ("orca", "paged"):
        latency[policy], batch[policy], _ = served(
            policy,
            "answer",
            "alpaca-like",
            20.0,
            model="opt-175b",
            gpus="device: a100-80gb, devices: 8",
            requests=60,
        )
    assert latency["orca"] == pytest.approx(latency["paged"], rel=0.05)
    assert batch["orca"] == pytest.approx(batch["paged"], rel=0.05)


def test_the_longer_the_common_beginning_the_more_sharing_gains(tmp_path: Path) -> None:
    """Kwon et al. 2023, section 6.4: 1.67 times with one example before each sentence, 3.58 times with five."""
    gains: dict[int, float] = {}
    for example_tokens in (80, 336):
        arrivals_s = poisson_arrivals_s(120, 30.0, np.random.default_rng(0)).tolist()
        trace = [
            TraceRequest(
                arrival_s=at_s, prompt_tokens=example_tokens + 16, output_tokens=30, prompt_blocks=(1,)
            )
            for at_s in arrivals_s
        ]
        (tmp_path / "trace.jsonl").write_text("\n".join(format_trace(trace)))
        latency = {
            policy: served(policy, "answer", model="llama-13b", folder=tmp_path)[0]
            for policy in ("orca", "paged")
        }
        gains[example_tokens] = latency["orca"] / latency["paged"]
    assert 1.0 < gains[80] < gains[336]


def test_blocks_of_128_tokens_hurt_short_requests_more() -> None:
    """Kwon et al. 2023, section 7.2: with Alpaca's lengths sequences are shorter than such blocks."""
    slower = {
        lengths: served("paged", "answer", lengths, rate, requests=requests, block_tokens=128)[0]
        / served("paged", "answer", lengths, rate, requests=requests)[0]
        for lengths, rate, requests in (("alpaca-like", 150.0, 300), ("sharegpt-like", 2.0, 80))
    }
    assert slower["alpaca-like"] > max(1.1, slower["sharegpt-like"])


def blocks_saved(lengths: str, width: int, *, beams: bool) -> float:
    """By samples (or beams, each of which goes on from a random one) of one prompt, as a part of the blocks named."""
    rng = np.random.default_rng(1)
    prompts, answers = length_mix_named(lengths).draw(12, rng, most_total_tokens=600)
    scheduler = Scheduler(policy_named("paged"), KvBlockPool(10_000, 16), None, StepLimits())
    for number, (prompt, answer) in enumerate(zip(prompts.tolist(), answers.tolist(), strict=True)):
        scheduler.submit(
            NewRequest(
                id=RequestId(str(number)),
                token_ids=[number] * prompt,
                max_sequence_tokens=prompt + answer + 1,
                fan_out=width,
                reuse_prefix=False,
            )
        )
    produced: dict[RequestId, int] = {}
    named = distinct = 0
    while scheduler.has_requests:
        step = scheduler.schedule()
        scheduler.complete(step)
        tables = [chunk.kv_blocks for chunk in step.chunks if chunk.request_id in produced]
        named += sum(map(len, tables))
        distinct += len({block for table in tables for block in table})
        for id in dict.fromkeys(chunk.request_id for chunk in step.chunks if chunk.samples):
            if beams or id not in produced:
                parents = rng.integers(width, size=width).tolist() if id in produced else [0] * width
                scheduler.fork(id, parents)
            produced[id] = produced.get(id, 0) + 1
            if produced[id] > int(answers[int(id)]):
                scheduler.finish(id)
                continue
            for index in range(width):
                scheduler.append(id, index, 0)
    return 1.0 - distinct / named


def test_samples_share_their_prompt_and_beams_more() -> None:
    """Kwon et al. 2023, section 6.3: 6 to 10 % (Alpaca) and 16 to 31 % (ShareGPT) by samples, 38 to 66 % by beams."""
    assert 0.0 < blocks_saved("alpaca-like", 4, beams=False) < blocks_saved("sharegpt-like", 4, beams=False)
    assert blocks_saved("sharegpt-like", 2, beams=False) < blocks_saved("sharegpt-like", 6, beams=False)
    assert blocks_saved("sharegpt-like", 2, beams=True) > 0.37
    assert blocks_saved("sharegpt-like", 4, beams=False) < blocks_saved("sharegpt-like", 4, beams=True)


def test_recomputing_a_sequence_costs_about_what_swapping_it_does_with_blocks_of_16() -> None:
    """Kwon et al. 2023, section 7.3, where each block is a copy for each layer, keys and values apart, over PCIe."""
    spec = published_spec("opt-13b")
    shape = SpanShape(spec, range(len(spec.blocks)), Formats())
    costs = RooflineCosts(shape=shape, device=device_named("a100-40gb"), efficiency=ASSUMED)
    tokens, copy_s, bytes_per_s = 512, 8e-6, 25e9
    recomputed_s = costs.step_s(StepWork.of([(tokens, 0)], sampled=1))

    def swapped_s(block_tokens: int) -> float:
        copies = tokens // block_tokens * 2 * len(spec.blocks)
        return 2 * (tokens * costs.kv_bytes_per_token / bytes_per_s + copies * copy_s)

    assert swapped_s(1) > 10 * recomputed_s
    assert swapped_s(64) < recomputed_s < swapped_s(16) < 2 * recomputed_s
