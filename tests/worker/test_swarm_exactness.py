"""A chain of workers answers as one engine does, token for token."""

import asyncio
from itertools import combinations

import pytest
from swarm_rig import (
    BLOCKS,
    Answer,
    MemoryNet,
    SwarmRig,
    cut_at,
    on_one_machine,
    some_prompt,
    swarm,
    tiny_request,
)

from plait.errors import BadRequest
from plait.kernels import native_available
from plait.routing import RouteWish
from plait.session import Constraint, GenerationRequest
from plait.simulator import run_virtual
from plait.worker.swarm_engine import SwarmOptions


def mixed_requests() -> list[GenerationRequest]:
    """Greedy and seeded, short and long, with penalties, stops, log-probabilities and several samples."""
    return [
        tiny_request("greedy", some_prompt(30, 1), 24, temperature=0.0),
        tiny_request("long prompt", some_prompt(600, 2), 8, temperature=0.0),
        tiny_request("seeded", some_prompt(5, 3), 24, temperature=1.0, seed=5),
        tiny_request("filtered", some_prompt(40, 4), 20, temperature=0.8, top_k=40, top_p=0.9, seed=6),
        tiny_request(
            "penalised",
            some_prompt(17, 5),
            20,
            temperature=0.0,
            repetition_penalty=1.3,
            frequency_penalty=0.5,
            logit_bias={91: -2.0},
        ),
        tiny_request("samples", some_prompt(12, 6), 16, temperature=1.0, seed=7, n=3),
        tiny_request("logprobs", some_prompt(9, 7), 12, temperature=1.0, seed=8, logprobs=4),
        tiny_request("one token", some_prompt(1, 8), 1, temperature=0.0),
        tiny_request("ends", some_prompt(8, 9), 200, ignore_eos=False, temperature=1.0, seed=3, min_tokens=4),
    ]


def same(answer: Answer, expected: Answer) -> None:
    assert answer.token_ids == expected.token_ids
    assert answer.text == expected.text
    assert answer.finish == expected.finish
    for index, values in expected.logprobs.items():
        # torch's products may round differently for another number of rows.
        assert answer.logprobs[index] == pytest.approx(values, abs=2e-4)


async def answers_of(rig: SwarmRig, requests: list[GenerationRequest]) -> dict[str, Answer]:
    """All at once."""
    answers = await asyncio.gather(*(rig.ask(request) for request in requests))
    await rig.settle()
    rig.check_all_free()
    return {str(request.id): answer for request, answer in zip(requests, answers, strict=True)}


@pytest.fixture(scope="module")
def expected() -> dict[str, Answer]:
    return on_one_machine(mixed_requests())


@pytest.mark.parametrize("cuts", [(), (3,), (1, 4), (2, 3, 5), (1, 2, 3, 4, 5)])
def test_chains_of_any_length_answer_as_one_engine(
    cuts: tuple[int, ...], expected: dict[str, Answer]
) -> None:
    async def main() -> None:
        async with swarm(cut_at(*cuts)) as rig:
            for name, answer in (await answers_of(rig, mixed_requests())).items():
                same(answer, expected[name])

    run_virtual(main())


@pytest.mark.slow
@pytest.mark.parametrize("hops", range(1, BLOCKS + 1))
def test_every_cut_answers_as_one_engine(hops: int, expected: dict[str, Answer]) -> None:
    async def main(cuts: tuple[int, ...]) -> None:
        async with swarm(cut_at(*cuts)) as rig:
            for name, answer in (await answers_of(rig, mixed_requests())).items():
                same(answer, expected[name])

    for cuts in combinations(range(1, BLOCKS), hops - 1):
        run_virtual(main(cuts))


@pytest.mark.parametrize("drafts", [1, 6])
def test_guessing_ahead_changes_no_token(drafts: int, expected: dict[str, Answer]) -> None:
    async def main() -> None:
        async with swarm(cut_at(2, 4), options=SwarmOptions(draft_tokens=drafts)) as rig:
            for name, answer in (await answers_of(rig, mixed_requests())).items():
                same(answer, expected[name])

    run_virtual(main())


def test_guessing_ahead_saves_rounds_where_text_repeats_itself() -> None:
    prompt = some_prompt(12, 3) * 6
    request = tiny_request("repeats", prompt, 60, temperature=0.0)
    expected = on_one_machine([request])["repeats"]

    async def steps_to_the_last_hop(drafts: int) -> int:
        async with swarm(cut_at(2, 4), options=SwarmOptions(draft_tokens=drafts)) as rig:
            same(await rig.ask(request), expected)
            await rig.settle()
            rig.check_all_free()
            return rig.hosts["c"].messages["Step"]

    plain = run_virtual(steps_to_the_last_hop(0))
    guessing = run_virtual(steps_to_the_last_hop(8))
    assert plain >= 60
    assert guessing < 0.7 * plain


def test_sessions_that_cross_a_worker_together_share_its_steps() -> None:
    requests = [tiny_request(f"{number}", some_prompt(8, number), 20, temperature=0.0) for number in range(8)]
    expected = on_one_machine(requests)

    async def main() -> None:
        async with swarm(cut_at(3)) as rig:
            before = rig.hosts["b"].engine.load()
            for name, answer in (await answers_of(rig, requests)).items():
                same(answer, expected[name])
            load = rig.hosts["b"].engine.load()
            tokens = load.step_tokens_total - before.step_tokens_total
            assert tokens == sum(8 + 19 for _ in requests)
            assert load.steps_total - before.steps_total < 0.5 * tokens

    run_virtual(main())


@pytest.mark.skipif(not native_available, reason="the CPU kernels are not built")
def test_the_cpu_kernels_give_the_same_bits_in_a_chain() -> None:
    requests = mixed_requests()
    expected = on_one_machine(requests, "bfloat16")

    async def main() -> None:
        rig = SwarmRig(MemoryNet(), dtype="bfloat16")
        async with swarm(cut_at(1, 4), rig=rig, options=SwarmOptions(draft_tokens=3)) as rig:
            for name, answer in (await answers_of(rig, requests)).items():
                same(answer, expected[name])
                assert answer.logprobs == expected[name].logprobs

    run_virtual(main())


@pytest.mark.parametrize("wire_format", ["bfloat16", "int8"])
def test_hidden_states_may_travel_rounded(wire_format: str) -> None:
    """The answer may differ then, but is one, and the same every time and after a loss."""
    request = tiny_request("x", some_prompt(30, 1), 20, temperature=0.0)

    async def once(lose: bool) -> Answer:
        options = SwarmOptions(wire_format=wire_format)  # type: ignore[arg-type]
        async with swarm({**cut_at(2, 4), "B": range(2, 4)}, options=options) as rig:
            answer = Answer()
            asking = asyncio.create_task(rig.ask(request, answer))
            if lose:
                while not answer.deltas > 8:
                    await asyncio.sleep(0)
                await rig.kill(next(name for name in "bB" if rig.hosts[name].worker.sessions))
            await asking
            return answer

    first = run_virtual(once(lose=False))
    assert len(first.token_ids[0]) == 20
    assert run_virtual(once(lose=True)).token_ids == first.token_ids


def test_stop_strings_are_found_at_the_gateway_and_free_the_chain() -> None:
    plain = on_one_machine([tiny_request("x", some_prompt(30, 1), 40, temperature=0.0)])["x"].text[0]
    request = tiny_request("x", some_prompt(30, 1), 40, temperature=0.0, stop=[plain[12:15]])
    expected = on_one_machine([request])["x"]
    assert expected.finish[0] == ("stop", plain[12:15])

    async def main() -> None:
        async with swarm(cut_at(3), options=SwarmOptions(draft_tokens=4)) as rig:
            same((await answers_of(rig, [request]))["x"], expected)

    run_virtual(main())


def test_a_constraint_is_followed_by_the_last_hop() -> None:
    constraint = Constraint(kind="regex", text="(cat|dog) [0-9]{3}")
    requests = [
        tiny_request(f"{seed}", some_prompt(9, seed), 30, ignore_eos=False, seed=seed, constraint=constraint)
        for seed in range(4)
    ]
    expected = on_one_machine(requests)

    async def main() -> None:
        async with swarm(cut_at(2, 4)) as rig:
            for name, answer in (await answers_of(rig, requests)).items():
                same(answer, expected[name])
                assert answer.text[0][:3] in ("cat", "dog")

    asyncio.run(main())  # constraints are compiled in a thread


def test_what_a_swarm_does_not_do_is_refused_by_name() -> None:
    refused = {"beam_width": 2, "best_of": 3, "prompt_logprobs": 1}

    async def main() -> None:
        async with swarm(cut_at(3)) as rig:
            for name, value in refused.items():
                with pytest.raises(BadRequest, match=name) as raised:
                    await rig.ask(tiny_request("x", (5, 6), 4, **{name: value}))
                assert raised.value.param == name
            for prompt, why in (((), "empty"), ((5000,), "between"), ((5,) * 2000, "context")):
                with pytest.raises(BadRequest, match=why):
                    await rig.ask(tiny_request("x", prompt, 4))
            rig.check_all_free()

    run_virtual(main())


OVERLAPPING = {"a": range(4), "b": range(2, 6), "c": range(1, 3), "d": range(3, 6), "e": range(6)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sessions_cross_parts_of_spans_that_overlap(dtype: str) -> None:
    """A chain enters a worker where the one before ends; sessions of different parts cross it at the same time."""
    if dtype == "bfloat16" and not native_available:
        pytest.skip("the CPU kernels are not built")
    requests = [
        tiny_request(f"{number}", some_prompt(12 + number, number), 20, seed=number, logprobs=1)
        for number in range(12)
    ]
    expected = on_one_machine(requests, dtype)

    async def main() -> None:
        options = SwarmOptions(route=RouteWish(mode="throughput"), draft_tokens=2)
        async with swarm(OVERLAPPING, options=options, dtype=dtype) as rig:
            chains: set[tuple[tuple[int, int], ...]] = set()
            asking = [asyncio.create_task(rig.ask(request)) for request in requests]
            while not all(task.done() for task in asking):
                chains |= {
                    tuple((hop.first_block, hop.end_block) for hop in hops)
                    for hops in rig.gateway.chains().values()
                }
                await asyncio.sleep(0)
            for request, task in zip(requests, asking, strict=True):
                same(task.result(), expected[str(request.id)])
            await rig.settle()
            rig.check_all_free()
            whole = {(blocks.start, blocks.stop) for blocks in OVERLAPPING.values()}
            assert any(hop not in whole for chain in chains for hop in chain)

    run_virtual(main())
