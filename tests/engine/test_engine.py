"""The engine against itself alone: whatever else runs, whatever is preempted, the same request gives the same tokens.

Runs in float64, where rounding cannot turn a near-tie, so equality is exact and not a matter of luck.
"""

import functools
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import plait.model
from plait.engine import Engine, EngineOptions, load_engine
from plait.errors import BadRequest, BadSetup, NoCapacity
from plait.ids import RequestId
from plait.scheduling import StepLimits
from plait.session import Constraint, GenerationRequest, RequestDelta, SamplingParams

TINY = Path(plait.model.__file__).parent / "tiny"
BLOCK_BYTES = 16 * 6 * 2 * 4 * 32 * 8  # tokens x layers x (K, V) x kv_heads x head_dim x float64


def make_engine(
    *,
    policy: str = "paged",
    kv_blocks: int = 256,
    host_kv_blocks: int = 0,
    prefix: bool = True,
    **limits: object,
) -> Engine:
    return load_engine(
        EngineOptions(
            folder=TINY,
            dtype="float64",
            kv_cache_bytes=kv_blocks * BLOCK_BYTES,
            swap_bytes=host_kv_blocks * BLOCK_BYTES,
            policy=policy,
            limits=replace(StepLimits(), **limits),
            prefix_caching=prefix,
            threads=1,
        )
    )


def request(id: str, prompt: tuple[int, ...], sampling: SamplingParams, **more: object) -> GenerationRequest:
    return GenerationRequest(id=RequestId(id), prompt_token_ids=prompt, sampling=sampling, **more)


def tokens_of(deltas: list[RequestDelta]) -> dict[int, tuple[int, ...]]:
    tokens: dict[int, tuple[int, ...]] = {}
    for delta in deltas:
        for part in delta.sequences:
            tokens[part.index] = tokens.get(part.index, ()) + part.token_ids
    return tokens


def run(engine: Engine, requests: list[GenerationRequest]) -> dict[str, list[RequestDelta]]:
    deltas: dict[str, list[RequestDelta]] = {item.id: [] for item in requests}
    for item in requests:
        engine.add(item)
    while engine.has_work:
        for delta in engine.step():
            deltas[delta.request_id].append(delta)
        engine.check()
    assert engine.status().kv_blocks_used == 0
    return deltas


@functools.cache
def solo_engine() -> Engine:
    return make_engine(prefix=False)


@functools.cache
def solo_tokens(prompt: tuple[int, ...], sampling: "Asked") -> dict[int, tuple[int, ...]]:
    return tokens_of(run(solo_engine(), [request("solo", prompt, sampling.params())])["solo"])


@dataclass(frozen=True)
class Asked:
    """Hashable sampling parameters."""

    max_tokens: int
    temperature: float
    seed: int
    sequences: int
    kept: int
    beam_width: int = 0
    repetition_penalty: float = 1.0

    def params(self) -> SamplingParams:
        if self.beam_width:
            return SamplingParams(
                max_tokens=self.max_tokens, beam_width=self.beam_width, n=self.beam_width, temperature=0.0
            )
        return SamplingParams(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            seed=self.seed,
            n=self.kept,
            best_of=self.sequences,
            top_p=0.95,
            repetition_penalty=self.repetition_penalty,
        )


@st.composite
def asked(draw: st.DrawFn) -> Asked:
    sequences = draw(st.sampled_from((1, 1, 1, 2, 3)))
    return Asked(
        max_tokens=draw(st.integers(1, 24)),
        temperature=draw(st.sampled_from((0.0, 0.8, 1.3))),
        seed=draw(st.integers(0, 5)),
        sequences=sequences,
        kept=draw(st.integers(1, sequences)),
        beam_width=draw(st.sampled_from((0, 0, 0, 0, 2, 3))),
        repetition_penalty=draw(st.sampled_from((1.0, 1.0, 1.3))),
    )


@dataclass(frozen=True)
class Arrival:
    step: int
    prompt: tuple[int, ...]
    asked: Asked
    priority: int
    cancel_after: int | None


@st.composite
def arrivals(draw: st.DrawFn) -> list[Arrival]:
    shared = tuple(range(300, 340))
    found: list[Arrival] = []
    for _ in range(draw(st.integers(1, 6))):
        head = shared[: draw(st.sampled_from((0, 16, 33, 40)))]
        tail = tuple(draw(st.lists(st.integers(10, 2000), min_size=1, max_size=40)))
        found.append(
            Arrival(
                step=draw(st.integers(0, 12)),
                prompt=head + tail,
                asked=draw(asked()),
                priority=draw(st.integers(0, 1)),
                cancel_after=draw(st.sampled_from((None, None, None, 1, 4))),
            )
        )
    return found


SCENARIOS = {
    "static": {"policy": "static", "kv_blocks": 48, "max_running_sequences": 6},
    "orca": {"policy": "orca", "kv_blocks": 48, "max_running_sequences": 6},
    "paged": {"policy": "paged", "kv_blocks": 256, "step_tokens": 48},
    "paged, recompute": {"policy": "paged", "kv_blocks": 24, "step_tokens": 32, "preemption": "recompute"},
    "paged, swap": {
        "policy": "paged",
        "kv_blocks": 24,
        "host_kv_blocks": 24,
        "step_tokens": 32,
        "preemption": "swap",
    },
}


@functools.cache
def scenario_engine(name: str) -> Engine:
    return make_engine(**SCENARIOS[name])


@pytest.mark.parametrize("scenario", SCENARIOS)
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(plan=arrivals())
def test_tokens_are_those_of_a_solo_run(scenario: str, plan: list[Arrival]) -> None:
    engine = scenario_engine(scenario)
    deltas: dict[str, list[RequestDelta]] = {}
    cancelled: set[str] = set()
    age: dict[str, int] = {}
    left = dict(enumerate(plan))
    step = 0
    while left or engine.has_work:
        for number, arrival in list(left.items()):
            if arrival.step <= step:
                del left[number]
                try:
                    engine.add(
                        request(
                            str(number), arrival.prompt, arrival.asked.params(), priority=arrival.priority
                        )
                    )
                    deltas[str(number)] = []
                except BadRequest as refusal:
                    assert "KV" in refusal.message
        for delta in engine.step():
            deltas[delta.request_id].append(delta)
        engine.check()
        for number, arrival in enumerate(plan):
            id = str(number)
            if id in deltas:
                age[id] = age.get(id, 0) + 1
                if arrival.cancel_after == age[id]:
                    cancelled.add(id)
                    engine.abort(RequestId(id))
                    engine.check()
        step += 1
        assert step < 5000, "no progress"
    assert engine.status().kv_blocks_used == 0
    for number, arrival in enumerate(plan):
        id = str(number)
        if id in deltas and id not in cancelled:
            assert tokens_of(deltas[id]) == solo_tokens(arrival.prompt, arrival.asked), id


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_forced_preemption_changes_no_token(preemption: str) -> None:
    engine = make_engine(kv_blocks=24, host_kv_blocks=24, preemption=preemption)
    wanted = [(tuple(range(100 + 50 * n, 130 + 50 * n)), Asked(60, 0.9, n, 1, 1)) for n in range(8)]
    deltas = run(engine, [request(str(n), p, a.params()) for n, (p, a) in enumerate(wanted)])
    assert engine.status().preemptions_total > 0
    for number, (prompt, params) in enumerate(wanted):
        assert tokens_of(deltas[str(number)]) == solo_tokens(prompt, params)


def test_a_repeated_prompt_hits_the_prefix_cache_and_another_salt_does_not() -> None:
    engine = make_engine()
    prompt = tuple(range(100, 180))
    params = SamplingParams(max_tokens=8, temperature=0.0)
    first = run(engine, [request("a", prompt, params)])["a"]
    again = run(engine, [request("b", prompt, params)])["b"]
    salted = run(engine, [request("c", prompt, params, cache_salt="another tenant")])["c"]
    assert first[-1].cached_tokens == 0
    assert again[-1].cached_tokens == 64  # the last full block stays out: its last token must be computed
    assert salted[-1].cached_tokens == 0
    assert tokens_of(first) == tokens_of(again) == tokens_of(salted)


def test_chunking_and_prefix_reuse_change_no_logit_beyond_rounding() -> None:
    prompt = tuple(range(100, 300))
    whole = make_engine().prompt_logits(prompt)
    chunked = make_engine(step_tokens=23).prompt_logits(prompt)
    assert whole.shape == (200, 2048)
    assert (whole - chunked).abs().max() < 1e-5 * whole.std()


def test_aborting_frees_everything_at_once() -> None:
    engine = make_engine()
    engine.add(request("a", tuple(range(100, 200)), SamplingParams(max_tokens=50, n=3, temperature=1.0)))
    for _ in range(5):
        engine.step()
    assert engine.status().kv_blocks_used > 0
    engine.abort(RequestId("a"))
    engine.abort(RequestId("a"))
    assert engine.status().kv_blocks_used == 0
    assert not engine.has_work


def test_samples_share_the_blocks_of_their_prompt() -> None:
    engine = make_engine(prefix=False)
    engine.add(request("a", tuple(range(100, 260)), SamplingParams(max_tokens=4, n=8, temperature=1.0)))
    engine.step()
    engine.step()
    assert engine.status().kv_blocks_used == 10 + 8  # ten full prompt blocks shared, one partial block each
    engine.abort(RequestId("a"))


def test_stop_strings_and_ids_end_a_sequence_and_are_reported() -> None:
    engine = make_engine()
    prompt = tuple(engine.tokenizer.encode("def main():\n    import os\n"))
    free = run(engine, [request("a", prompt, SamplingParams(max_tokens=40, temperature=0.0))])["a"]
    text = "".join(part.text for delta in free for part in delta.sequences)
    ids = tokens_of(free)[0]
    stop = text[5:9]
    stopped = run(engine, [request("b", prompt, SamplingParams(max_tokens=40, temperature=0.0, stop=stop))])[
        "b"
    ]
    last = stopped[-1].sequences[0]
    assert last.finish_reason == "stop"
    assert last.stop_reason == stop
    assert "".join(part.text for delta in stopped for part in delta.sequences) == text[: text.index(stop)]
    by_id = SamplingParams(max_tokens=40, temperature=0.0, stop_token_ids=[ids[6]])
    stopped = run(engine, [request("c", prompt, by_id)])["c"]
    assert tokens_of(stopped)[0] == ids[: ids.index(ids[6]) + 1]
    assert stopped[-1].sequences[0].stop_reason == ids[6]


def test_logprobs_agree_with_the_logits() -> None:
    engine = make_engine()
    prompt = tuple(range(100, 120))
    params = SamplingParams(max_tokens=5, temperature=0.0, logprobs=3, prompt_logprobs=2)
    deltas = run(engine, [request("a", prompt, params)])["a"]
    ids = tokens_of(deltas)[0]
    logprobs = engine.prompt_logits(prompt + ids).log_softmax(-1)
    positions = [position for delta in deltas for part in delta.sequences for position in part.logprobs]
    for offset, position in enumerate(positions):
        row = logprobs[len(prompt) - 1 + offset]
        assert position.chosen.token_id == ids[offset] == row.argmax()
        assert abs(position.chosen.logprob - row[ids[offset]]) < 1e-4
        assert [token.token_id for token in position.top] == row.topk(3).indices.tolist()
    reported = deltas[0].prompt_logprobs
    assert len(reported) == len(prompt)
    assert reported[0] is None
    for offset in range(1, len(prompt)):
        assert abs(reported[offset].chosen.logprob - logprobs[offset - 1][prompt[offset]]) < 1e-4


def test_a_constraint_holds_for_every_sample() -> None:
    engine = make_engine()
    constraint = Constraint(kind="regex", text="[a-c]{3}-[0-9]{2}")
    params = SamplingParams(max_tokens=30, temperature=1.5, n=4, seed=3, constraint=constraint)
    deltas = run(engine, [request("a", (100, 101, 102), params)])["a"]
    for index in range(4):
        text = "".join(part.text for delta in deltas for part in delta.sequences if part.index == index)
        letters, digits = text.split("-")
        assert len(letters) == 3
        assert set(letters) <= set("abc")
        assert digits.isdigit()
        assert len(digits) == 2


def test_what_can_never_run_is_refused_by_name() -> None:
    engine = make_engine(kv_blocks=8)
    assert engine.max_model_tokens == 128
    with pytest.raises(BadRequest, match="empty"):
        engine.add(request("a", (), SamplingParams()))
    with pytest.raises(BadRequest, match="context is 128 tokens"):
        engine.add(request("a", tuple(range(100, 228)), SamplingParams()))
    with pytest.raises(BadRequest, match="token ids must be between"):
        engine.add(request("a", (5000,), SamplingParams()))
    with pytest.raises(BadRequest, match="KV"):
        engine.add(request("a", (100,) * 100, SamplingParams(n=8, max_tokens=20)))
    assert not engine.has_work


def test_a_full_queue_refuses_with_no_capacity() -> None:
    engine = make_engine(max_waiting=2)
    for number in range(2):
        engine.add(request(str(number), (100, 101), SamplingParams()))
    with pytest.raises(NoCapacity) as refusal:
        engine.add(request("late", (100, 101), SamplingParams()))
    assert refusal.value.retry_after_s > 0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_model_tokens": 5000}, "--max-model-len 5000"),
        ({"max_model_tokens": 1024, "kv_cache_bytes": 4 * BLOCK_BYTES}, "--kv-cache-memory"),
        ({"kv_cache_bytes": 1000}, "--kv-cache-memory"),
        ({"policy": "nonesuch"}, "paged"),
    ],
)
def test_options_that_do_not_fit_are_a_sentence(options: dict[str, object], sentence: str) -> None:
    defaults = EngineOptions(folder=TINY, dtype="float64", threads=1)
    with pytest.raises(BadSetup, match=sentence):
        load_engine(replace(defaults, **options))
