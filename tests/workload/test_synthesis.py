"""Synthetic workloads have the statistics that they are asked for: distances, rates and hits are counted here."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.errors import BadSetup
from plait.workload import (
    LENGTH_MIXES,
    PREFIX_REUSES,
    PROMPT_BLOCK_TOKENS,
    ConversationMix,
    DailyRate,
    Equal,
    PromptBlocks,
    Quantiles,
    TraceRequest,
    daily_arrivals_s,
    gamma_arrivals_s,
    length_mix_named,
    on_off_arrivals_s,
    poisson_arrivals_s,
    prefix_statistics,
    synthesize_conversations,
    synthesize_trace,
    zipf_weights,
)

PUBLISHED = [name for name, mix in LENGTH_MIXES.items() if isinstance(mix.prompt, Quantiles)]


@pytest.mark.parametrize("name", PUBLISHED)
def test_lengths_have_the_published_quantiles(name: str) -> None:
    mix = length_mix_named(name)
    prompts, outputs = mix.draw(40_000, np.random.default_rng(11))
    for table, drawn in ((mix.prompt, prompts), (mix.output, outputs)):
        assert isinstance(table, Quantiles)
        places, counts = np.unique(drawn, return_counts=True)
        distance = np.abs(np.cumsum(counts) / len(drawn) - table.fraction_up_to(places)).max()
        assert distance < 0.02
        assert drawn.min() >= table.tokens[0] and drawn.max() <= table.tokens[-1]
        assert np.median(drawn) == pytest.approx(table.tokens[5], rel=0.05, abs=1)
    assert abs(np.corrcoef(prompts, outputs)[0, 1]) < 0.02


@pytest.mark.parametrize("wrong", [(1, 2), (3, 2, 1, 4, 5, 6, 7, 8, 9, 10, 11), (0,) * 11])
def test_quantiles_that_are_none_are_refused(wrong: tuple[int, ...]) -> None:
    with pytest.raises(BadSetup, match="quantiles"):
        Quantiles(wrong)


def variation_per_minute(times_s: np.ndarray) -> float:
    """The coefficient of variation of the gaps within a minute, averaged over the minutes."""
    minutes = np.split(times_s, np.searchsorted(times_s, np.arange(60.0, times_s[-1], 60.0)))
    return float(np.mean([np.diff(each).std() / np.diff(each).mean() for each in minutes if len(each) > 50]))


@pytest.mark.parametrize("variation", [0.5, 1.02, 2.0])
def test_gamma_arrivals_have_their_rate_and_their_variation_within_minutes(variation: float) -> None:
    times_s = gamma_arrivals_s(300_000, 5.53, variation, np.random.default_rng(1))
    assert 300_000 / times_s[-1] == pytest.approx(5.53, rel=0.01)
    assert variation_per_minute(times_s) == pytest.approx(variation, rel=0.05)


def test_bursts_and_silence_have_their_rate_and_leave_seconds_empty() -> None:
    # Azure's code trace: 2.57 requests/s, 9.6 in busy seconds, 73 % of the seconds empty.
    often_s = on_off_arrivals_s(1_000_000, 2.57, 0.2677, 1.0, np.random.default_rng(2))
    assert (np.diff(often_s) >= 0).all()
    assert 1_000_000 / often_s[-1] == pytest.approx(2.57, rel=0.01)
    times_s = on_off_arrivals_s(600_000, 2.57, 0.2677, 20.0, np.random.default_rng(2))
    each_second = np.bincount(times_s.astype(int))
    assert (each_second == 0).mean() == pytest.approx(0.73, abs=0.03)
    assert each_second[each_second > 0].mean() == pytest.approx(9.6, rel=0.06)


def test_a_day_has_its_mean_rate_its_peak_and_its_weekend() -> None:
    daily = DailyRate(swing=0.8, peak_s=15 * 3600.0, weekdays=(1, 1, 1, 1, 1, 0.4, 0.3))
    weeks = 4
    rate = 0.5
    times_s = daily_arrivals_s(round(rate * 86400 * 7 * weeks), rate, 1.0, daily, np.random.default_rng(3))
    assert len(times_s) / times_s[-1] == pytest.approx(rate, rel=0.01)
    of_hour = np.bincount((times_s % 86400 // 3600).astype(int), minlength=24)
    assert of_hour[14:16].sum() / of_hour[2:4].sum() == pytest.approx(1.8 / 0.2, rel=0.1)
    of_day = np.bincount((times_s // 86400).astype(int) % 7, minlength=7)
    assert of_day[6] / of_day[0] == pytest.approx(0.3, rel=0.05)
    flat = daily_arrivals_s(20_000, rate, 1.0, DailyRate(swing=0.0), np.random.default_rng(4))
    assert np.diff(flat).std() / np.diff(flat).mean() == pytest.approx(1.0, rel=0.03)


@pytest.mark.parametrize(
    ("name", "hits", "reusing"), [("mooncake-conv", 0.366, 0.387), ("mooncake-synthetic", 0.640, 0.438)]
)
def test_prompts_begin_alike_as_often_as_in_the_published_traces(
    name: str, hits: float, reusing: float
) -> None:
    rng = np.random.default_rng(7)
    trace = synthesize_trace(poisson_arrivals_s(20_000, 1.0, rng).tolist(), length_mix_named(name), rng)
    blocks = PREFIX_REUSES[name].draw([request.prompt_tokens for request in trace], rng)
    numbered = [replace(request, prompt_blocks=each) for request, each in zip(trace, blocks, strict=True)]
    assert all(
        len(request.prompt_blocks) == -(-request.prompt_tokens // PROMPT_BLOCK_TOKENS) for request in numbered
    )
    found = prefix_statistics(numbered)
    assert found.hit_fraction == pytest.approx(hits, abs=0.02)
    assert found.reusing_fraction == pytest.approx(reusing, abs=0.02)


texts = st.lists(st.integers(0, 2), max_size=6)


@given(st.lists(texts, min_size=1, max_size=6))
def test_blocks_are_equal_exactly_where_the_prompts_are(prompts: list[list[int]]) -> None:
    """Each letter stands for 300 tokens of its own: compared with the tokens themselves."""
    blocks = PromptBlocks()
    numbered = [blocks.of([(letter, 300) for letter in prompt]) for prompt in prompts]
    tokens = [[(letter, place) for letter in prompt for place in range(300)] for prompt in prompts]
    for one in range(len(prompts)):
        for other in range(len(prompts)):
            for index, number in enumerate(numbered[one]):
                end = min((index + 1) * PROMPT_BLOCK_TOKENS, len(tokens[one]))
                theirs = tokens[other][: (index + 1) * PROMPT_BLOCK_TOKENS]
                equal = tokens[one][:end] == theirs
                assert (index < len(numbered[other]) and numbered[other][index] == number) == equal


def test_hits_by_hand() -> None:
    trace = [
        TraceRequest(arrival_s=0.0, prompt_tokens=1, output_tokens=1, prompt_blocks=blocks)
        for blocks in ((0, 1, 2), (0, 1, 3), (9, 1), (0, 1, 2), ())
    ]
    found = prefix_statistics(trace)
    assert found.hit_fraction == (2 + 3) / 11
    assert found.reusing_fraction == 2 / 5


MIX = ConversationMix(
    question=Equal(700),
    answer=Equal(324),
    tenants=5,
    tenant_exponent=1.0,
    instruction_tokens=1024,
    mean_turns=3.0,
    think_s=10.0,
    output_tokens_per_s=32.4,
    documents=4,
    document_tokens=2048,
    document_fraction=0.25,
)


def test_conversations_have_their_turns_tenants_documents_and_pauses() -> None:
    count = 6000
    trace = synthesize_conversations(count, 2.0, 1.0, MIX, np.random.default_rng(5))
    assert [request.arrival_s for request in trace] == sorted(request.arrival_s for request in trace)
    assert len(trace) / count == pytest.approx(3.0, rel=0.03)
    first = [request for request in trace if request.turn == 0]
    assert count / first[-1].arrival_s == pytest.approx(2.0, rel=0.03)
    tenants = Counter(request.tenant for request in first)
    for rank, weight in enumerate(zipf_weights(5, 1.0)):
        assert tenants[f"t{rank}"] / count == pytest.approx(weight, abs=0.02)
    with_document = sum(request.prompt_tokens == 1024 + 2048 + 700 for request in first)
    assert with_document / count == pytest.approx(0.25, abs=0.02)
    by_conversation: dict[str, list[TraceRequest]] = {}
    for request in trace:
        by_conversation.setdefault(request.conversation or "", []).append(request)
    pauses: list[float] = []
    for requests in by_conversation.values():
        assert [request.turn for request in requests] == list(range(len(requests)))
        for one, next_one in pairwise(requests):
            assert next_one.prompt_tokens == one.prompt_tokens + 324 + 700
            whole = one.prompt_tokens // PROMPT_BLOCK_TOKENS
            assert next_one.prompt_blocks[:whole] == one.prompt_blocks[:whole]
            pauses.append(next_one.arrival_s - one.arrival_s)
    assert min(pauses) >= 10.0
    assert np.mean(pauses) == pytest.approx(20.0, rel=0.03)


def test_conversations_hit_what_their_structure_says() -> None:
    """Every turn finds all full blocks of the one before; a first one its tenant's instructions and document."""
    trace = synthesize_conversations(3000, 2.0, 1.0, MIX, np.random.default_rng(6))
    asked = hits = 0
    length_before: dict[str | None, int] = {}
    for request in trace:
        known = length_before.get(request.conversation)
        if known is None:
            known = 1024 if request.prompt_tokens < 2048 else 1024 + 2048
        length_before[request.conversation] = request.prompt_tokens
        asked += len(request.prompt_blocks)
        hits += known // PROMPT_BLOCK_TOKENS
    assert prefix_statistics(trace).hit_fraction == pytest.approx(hits / asked, abs=0.02)


def test_a_conversation_ends_where_its_prompt_would_be_too_long() -> None:
    mix = replace(MIX, mean_turns=20.0, most_total_tokens=5000)
    trace = synthesize_conversations(200, 2.0, 1.0, mix, np.random.default_rng(5))
    assert max(request.prompt_tokens + request.output_tokens for request in trace) <= 5000


def test_the_same_seed_gives_the_same_conversations() -> None:
    one, other, third = (
        synthesize_conversations(50, 2.0, 1.0, MIX, np.random.default_rng(seed)) for seed in (1, 1, 2)
    )
    assert one == other
    assert one != third


@pytest.mark.parametrize(
    "make",
    [
        lambda: on_off_arrivals_s(5, 1.0, 1.0, 1.0, np.random.default_rng(0)),
        lambda: DailyRate(swing=1.5),
        lambda: DailyRate(weekdays=(0.0,)),
        lambda: replace(MIX, mean_turns=0.5),
        lambda: replace(MIX, documents=0),
        lambda: zipf_weights(0, 1.0),
    ],
)
def test_what_cannot_be_is_refused(make: object) -> None:
    with pytest.raises(BadSetup):
        make()  # pyright: ignore[reportCallIssue]
