"""Spans in a chain compute what one engine does, whatever crosses them, goes back, is preempted or leaves."""

import functools
import itertools
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from span_chain import TINY, TINY_BLOCKS, Asked, Guess, SpanChain, tiny_options

from plait.engine import Engine, SpanEngine, SpanSession, load_engine, load_span_engine, open_checkpoint
from plait.engine.decoder import Decoder
from plait.engine.kv_store import KvStore
from plait.engine.loader import load_weights
from plait.engine.span_inputs import SpanInputs
from plait.errors import BadRequest, BadSetup, EngineFailure, NoCapacity, NotFound
from plait.ids import RequestId, SessionId
from plait.kernels import native_available
from plait.kvcache import KvBlockPool
from plait.scheduling import Scheduler, StepLimits, policy_named
from plait.session import Constraint, GenerationRequest, SamplingParams

KERNELS = pytest.mark.skipif(not native_available, reason="plait was installed without its CPU kernels")
DTYPES = ["float32", pytest.param("bfloat16", marks=KERNELS)]
"""torch, and the CPU kernels."""

CUTS = [
    [0, *inner, TINY_BLOCKS]
    for count in range(TINY_BLOCKS)
    for inner in itertools.combinations(range(1, TINY_BLOCKS), count)
]
GREEDY = SamplingParams(temperature=0.0, max_tokens=8)
PROMPT = tuple(range(100, 137))
ROOM = {"step_tokens": 16}


@functools.cache
def span(dtype: str, start: int, stop: int) -> SpanEngine:
    """A span with room for a few sessions and prompts in chunks of 16; tests leave it empty."""
    return load_span_engine(tiny_options(dtype, **ROOM), range(start, stop))


def chain_of(dtype: str, cut: list[int]) -> SpanChain:
    return SpanChain([span(dtype, *ends) for ends in itertools.pairwise(cut)])


@functools.cache
def whole(dtype: str) -> Engine:
    return load_engine(tiny_options(dtype, kv_cache_bytes=4 * 2**20, **ROOM))


def alone(dtype: str, prompt: tuple[int, ...], sampling: SamplingParams) -> tuple[list[int], list[object]]:
    """Tokens and log-probabilities of a request that one engine runs alone; of several samples, the last."""
    engine = whole(dtype)
    engine.add(GenerationRequest(id=RequestId("alone"), prompt_token_ids=prompt, sampling=sampling))
    tokens: list[int] = []
    logprobs: list[object] = []
    while engine.has_work:
        for part in [part for delta in engine.step() for part in delta.sequences]:
            if part.index == sampling.n - 1:
                tokens += part.token_ids
                logprobs += part.logprobs or ()
    assert not engine.take_failures()
    return tokens, logprobs


def run_chain(
    chain: SpanChain, prompt: tuple[int, ...], sampling: SamplingParams, guess: Guess | None = None
) -> Asked:
    asked = chain.run(chain.open(prompt, sampling, sample_index=sampling.n - 1), guess)
    for hop in chain.hops:
        hop.check()
        load = hop.load()
        assert load.sessions == 0 and load.kv_free_tokens == load.kv_total_tokens and not hop.has_work
    return asked


# ---- one session -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_cut_gives_the_tokens_and_logits_of_one_engine(dtype: str) -> None:
    """To the bit: 64 log-probabilities a position, whose normaliser has all logits in it."""
    sampling = SamplingParams(temperature=0.8, seed=3, max_tokens=4, ignore_eos=True, logprobs=64)
    expected = alone(dtype, PROMPT, sampling)
    for cut in CUTS:
        asked = run_chain(chain_of(dtype, cut), PROMPT, sampling)
        assert (list(asked.answer), asked.logprobs) == expected, cut


SAMPLINGS = {
    "greedy": GREEDY,
    "seeded": SamplingParams(temperature=1.1, top_p=0.9, top_k=50, min_p=0.01, seed=7, max_tokens=12),
    "negative seed": SamplingParams(seed=-5, max_tokens=12),
    "second sample": SamplingParams(temperature=1.0, seed=9, n=2, max_tokens=12),
    "penalties": SamplingParams(
        temperature=0.0, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.5, max_tokens=16
    ),
    "bias": SamplingParams(temperature=0.0, logit_bias={300: 12.5, 17: -100.0}, max_tokens=12),
    "held back": SamplingParams(
        temperature=0.0, logit_bias={0: 8.0}, min_tokens=6, max_tokens=12, logprobs=2
    ),
    "stop token": SamplingParams(temperature=0.0, logit_bias={17: 15.0}, stop_token_ids=[17], max_tokens=12),
    "constrained": SamplingParams(
        temperature=0.9,
        seed=1,
        max_tokens=24,
        constraint=Constraint(kind="regex", text="[0-9]{3}-[a-z]+ (yes|no)"),
    ),
}


@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_last_span_samples_as_an_engine_does(dtype: str, name: str) -> None:
    asked = run_chain(chain_of(dtype, [0, 2, 5, 6]), PROMPT, SAMPLINGS[name])
    assert (list(asked.answer), [each for each in asked.logprobs if each]) == alone(
        dtype, PROMPT, SAMPLINGS[name]
    )


def test_a_long_prompt_leaves_a_hop_in_pieces() -> None:
    chain = chain_of("float32", [0, 3, 6])
    first, second = chain.hops
    id = chain.open(PROMPT, GREEDY)
    chain.feed(id, 0)
    chain.step(0)
    assert [(each.start, len(each.token_ids), each.sample_rows) for each in chain.sent[0]] == [(0, 16, 0)]
    chain.arrive(0)
    chain.step(1)
    assert [(each.start, each.hidden, each.sampled) for each in chain.sent[1]] == [(0, None, ())]
    assert second.load().queued_tokens == 0 and first.load().queued_tokens == len(PROMPT) - 16
    chain.settle()
    assert len(chain.asked[id].answer) == 1
    chain.close(id)


def test_an_output_owns_its_memory() -> None:
    """What is kept of a long step for a replay must not keep all of the step."""
    chain = chain_of("float32", [0, 3, 6])
    ids = [chain.open(PROMPT[:4], GREEDY) for _ in range(3)]
    for id in ids:
        chain.feed(id, 0)
    chain.step(0)
    for output in chain.sent[0]:
        assert output.hidden is not None
        assert output.hidden.untyped_storage().nbytes() == output.hidden.numel() * 4
    for id in ids:
        chain.close(id)


# ---- guessed tokens ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [frozenset(), frozenset({0}), frozenset({2}), frozenset({1, 3})])
@pytest.mark.parametrize("name", ["greedy", "seeded", "penalties", "held back", "constrained"])
@KERNELS
def test_guessed_tokens_change_nothing_but_the_number_of_rounds(name: str, wrong: frozenset[int]) -> None:
    sampling = SAMPLINGS[name]
    expected, logprobs = alone("bfloat16", PROMPT, sampling)
    chain = chain_of("bfloat16", [0, 2, 5, 6])
    asked = run_chain(chain, PROMPT, sampling, Guess([*PROMPT, *expected], 4, wrong))
    assert list(asked.answer) == expected and [each for each in asked.logprobs if each] == logprobs
    right = min(wrong, default=4)
    assert chain.rounds <= 1 + -(-len(expected) // (right + 1))


@pytest.mark.parametrize("name", ["greedy", "seeded", "constrained"])
@KERNELS
def test_guesses_that_a_step_cannot_hold_come_out_whole_all_the_same(name: str) -> None:
    sampling = SAMPLINGS[name]
    expected, _ = alone("bfloat16", PROMPT, sampling)
    spans = [
        load_span_engine(tiny_options("bfloat16", step_tokens=3), range(*ends))
        for ends in ((0, 2), (2, 5), (5, 6))
    ]
    chain = SpanChain(spans)
    asked = run_chain(chain, PROMPT, sampling, Guess([*PROMPT, *expected], 6, frozenset({4})))
    assert list(asked.answer) == expected
    assert chain.rounds < len(expected)


@KERNELS
def test_going_back_into_guesses_of_which_a_part_has_run_loses_no_row() -> None:
    expected, _ = alone("bfloat16", PROMPT, GREEDY)
    chain = SpanChain(
        [load_span_engine(tiny_options("bfloat16", step_tokens=3), range(*ends)) for ends in ((0, 3), (3, 6))]
    )
    for cut in range(1, 6):
        for steps in (1, 2):
            id = chain.open(PROMPT, GREEDY)
            chain.feed(id, 0)
            chain.settle()
            asked, known = chain.asked[id], len(PROMPT)
            chain.feed(id, known, expected[1:5])
            for _ in range(steps):
                chain.step(0)
            chain.arrive(0)
            asked.token_ids[known + 1 :] = expected[1:cut]
            chain.feed(id, known + cut - 1)
            chain.settle()
            assert asked.answer == tuple(expected[: cut + 1]), (cut, steps)
            chain.close(id)


# ---- many sessions -----------------------------------------------------------------------------------------------


class Crowd:
    """Sessions that come, go back, are lost and begin again, over hops that are too small for all of them."""

    def __init__(self, seed: int, swap_bytes: int = 0) -> None:
        self.rng = random.Random(seed)
        cut = self.rng.choice(CUTS[1:])
        self.chain = SpanChain(
            [
                load_span_engine(
                    tiny_options(
                        "bfloat16",
                        kv_cache_bytes=self.rng.choice([9, 12])
                        * 16
                        * (512 * (stop - start) + 1536 * (stop > 1)),
                        swap_bytes=swap_bytes,
                        step_tokens=self.rng.choice([7, 24]),
                        max_running_sequences=self.rng.choice([3, 7]),
                        max_waiting=10,
                        watermark_fraction=0.0,
                        preemption="swap" if swap_bytes else "auto",
                    ),
                    range(start, stop),
                )
                for start, stop in itertools.pairwise(cut)
            ]
        )
        self.expected: dict[tuple[int, ...], list[int]] = {}
        self.finished = self.restarted = self.refused = self.went_back = 0

    def run(self, sessions: int) -> None:
        begun = 0
        while begun < sessions or self.chain.asked:
            choice = self.rng.random()
            if choice < 0.1:
                begun += begun < sessions and len(self.chain.asked) < 6 and self.begin()
            elif choice < 0.11 and self.chain.asked:
                self.go_back(self.rng.choice(list(self.chain.asked)))
            elif choice < 0.112 and self.chain.asked:
                self.chain.close(self.rng.choice(list(self.chain.asked)))
            else:
                self.advance()
        for hop in self.chain.hops:
            hop.check()
            assert hop.load().kv_free_tokens == hop.load().kv_total_tokens and not hop.has_work

    def begin(self) -> bool:
        prompt = tuple(self.rng.choices(range(5, 2000), k=self.rng.randint(1, 60)))
        sampling = SamplingParams(
            temperature=self.rng.choice([0.0, 0.9]),
            seed=self.rng.randrange(4),
            max_tokens=self.rng.randint(1, 30),
        )
        self.expected[prompt] = alone("bfloat16", prompt, sampling)[0]
        return self.open(prompt, sampling, ())

    def open(self, prompt: tuple[int, ...], sampling: SamplingParams, out: tuple[int, ...]) -> bool:
        try:
            id = self.chain.open(prompt, sampling, out=out)
        except NoCapacity:
            self.refused += 1
            return False
        self.chain.feed(id, 0)
        return True

    def go_back(self, id: SessionId) -> None:
        """What is on its way is lost, as when a hop is fenced; everything from some position on comes again."""
        asked = self.chain.asked[id]
        try:
            known = min(hop.known_tokens(id) for hop in self.chain.hops)
        except NotFound:  # ended for want of room; `advance` will notice
            return
        start = self.rng.randint(0, min(known, len(asked.token_ids) - 1))
        self.chain.rewind(id, start)
        self.went_back += 1
        self.chain.feed(id, start)

    def advance(self) -> None:
        busy = [place for place, hop in enumerate(self.chain.hops) if hop.has_work]
        moving = [place for place, sent in enumerate(self.chain.sent) if sent]
        assert busy or moving or not self.chain.asked, "everybody waits for everybody"
        if busy and (not moving or self.rng.random() < 0.5):
            place = self.rng.choice(busy)
            self.chain.step(place)
            self.begin_again(self.chain.hops[place])
        elif moving:
            place = self.rng.choice(moving)
            for id in self.chain.arrive(place):
                asked = self.chain.asked[id]
                if asked.ended:
                    self.finish(asked)
                else:
                    self.chain.feed(id, len(asked.token_ids) - 1, self.guess(asked))

    def guess(self, asked: Asked) -> list[int]:
        """Nothing, or a few tokens, any of which may be wrong."""
        expected = self.expected[tuple(asked.token_ids[: asked.session.prompt_tokens])]
        room = asked.session.max_tokens - len(asked.token_ids) - 1
        ahead = expected[len(asked.answer) :][: min(room, self.rng.choice([0, 0, 2, 5]))]
        return [token if self.rng.random() < 0.8 else self.rng.randrange(2000) for token in ahead]

    def finish(self, asked: Asked) -> None:
        prompt = tuple(asked.token_ids[: asked.session.prompt_tokens])
        assert list(asked.answer) == self.expected[prompt]
        self.finished += 1
        self.chain.close(asked.session.id)

    def begin_again(self, hop: SpanEngine) -> None:
        """What a hop had no room for is opened anew with the answer that it had."""
        for id, failure in hop.take_failures():
            assert isinstance(failure, NoCapacity)
            asked = self.chain.asked.get(id)
            if asked is None:  # it was closed meanwhile
                continue
            self.restarted += 1
            self.chain.close(id)
            prompt_tokens = asked.session.prompt_tokens
            self.open(tuple(asked.token_ids[:prompt_tokens]), asked.session.sampling, asked.answer)


@pytest.mark.parametrize("seed", range(4))
@KERNELS
def test_sessions_that_interleave_go_back_and_leave_give_what_they_give_alone(seed: int) -> None:
    crowd = Crowd(seed)
    crowd.run(sessions=30)
    assert crowd.finished > 8 and crowd.went_back
    assert crowd.restarted or crowd.refused or sum(hop.load().preemptions_total for hop in crowd.chain.hops)


@KERNELS
def test_swapped_sessions_give_what_they_give_alone() -> None:
    crowd = Crowd(1, swap_bytes=2**17)
    crowd.run(sessions=30)
    assert sum(hop.load().preemptions_total for hop in crowd.chain.hops)


@KERNELS
def test_every_iteration_batches_all_sessions_that_cross() -> None:
    chain = chain_of("bfloat16", [0, 3, 6])
    prompts = [PROMPT[:4], PROMPT[4:9], PROMPT[9:12]]
    ids = [chain.open(prompt, GREEDY) for prompt in prompts]
    for id in ids:
        chain.feed(id, 0)
    before = [hop.load().steps_total for hop in chain.hops]
    for _ in range(GREEDY.max_tokens):
        chain.settle()
        for id in ids:
            chain.feed(id, len(chain.asked[id].token_ids) - 1)
    assert [hop.load().steps_total - steps for hop, steps in zip(chain.hops, before, strict=True)] == [8, 8]
    for id, prompt in zip(ids, prompts, strict=True):
        assert list(chain.asked[id].answer) == alone("bfloat16", prompt, GREEDY)[0]
        chain.close(id)


# ---- memory ------------------------------------------------------------------------------------------------------

TOKEN_BYTES = 2 * 512  # keys and values of two blocks of `tiny` in bfloat16: 4 heads of 32
INPUT_BYTES = 4 * 256


def small_span(kv_blocks: int, **limits: object) -> SpanEngine:
    """Blocks 2:4 in bfloat16, with so many KV blocks, and half as many inputs again."""
    block_bytes = int(16 * (TOKEN_BYTES + 1.5 * INPUT_BYTES))
    return load_span_engine(
        tiny_options("bfloat16", kv_blocks * block_bytes, watermark_fraction=0.0, **limits), range(2, 4)
    )


def session(number: int, prompt_tokens: int, max_tokens: int, **more: object) -> SpanSession:
    arrived = float(number)
    id = SessionId(f"{number:032x}")
    return SpanSession(
        id=id, prompt_tokens=prompt_tokens, max_tokens=max_tokens, arrived_unix_s=arrived, **more
    )


def states(tokens: int) -> torch.Tensor:
    return torch.randn(tokens, 256, generator=torch.Generator().manual_seed(tokens))


def give(engine: SpanEngine, number: int, tokens: int) -> None:
    id = session(number, 1, 2).id
    engine.feed(id, engine.known_tokens(id), [7] * tokens, states(tokens), sample_rows=1)
    engine.check()


def run_out(engine: SpanEngine) -> dict[int, int]:
    """Step until nothing moves; returns how many positions of each session came out."""
    came_out: dict[int, int] = {}
    while outputs := engine.step():
        for output in outputs:
            came_out[int(output.id, 16)] = came_out.get(int(output.id, 16), 0) + len(output.token_ids)
        engine.check()
    return came_out


@KERNELS
def test_the_given_memory_holds_the_kv_blocks_and_the_inputs() -> None:
    for given in (2**17, 10**6):
        for blocks in (range(2, 4), range(2)):  # a chain may enter the first span behind its first block
            engine = load_span_engine(tiny_options("bfloat16", given), blocks)
            assert engine.load().kv_total_tokens == given // int(16 * (TOKEN_BYTES + 1.5 * INPUT_BYTES)) * 16
        first = load_span_engine(tiny_options("bfloat16", given), range(1))
        assert first.load().kv_total_tokens == given // (16 * TOKEN_BYTES // 2) * 16


@KERNELS
def test_prompts_that_cannot_be_kept_are_refused_and_the_latest_gives_way() -> None:
    engine = small_span(kv_blocks=8)  # 128 tokens, and the inputs of 192
    for number in (1, 2, 3):
        engine.open(session(number, 60, 128))
    with pytest.raises(NoCapacity):
        engine.open(session(4, 1, 128))
    for number in (1, 2, 3):
        give(engine, number, 60)
    assert run_out(engine) == {1: 60, 2: 60}, "the third waits for KV blocks"
    give(engine, 1, 10)
    assert [id for id, _ in engine.take_failures()] == [session(3, 1, 2).id]
    with pytest.raises(NotFound):
        give(engine, 3, 1)
    give(engine, 2, 50)
    assert not engine.take_failures()
    give(engine, 2, 8)
    [(id, failure)] = engine.take_failures()
    assert id == session(2, 1, 2).id and isinstance(failure, NoCapacity)
    give(engine, 1, 58)
    assert run_out(engine) == {1: 68}
    engine.close(session(1, 1, 2).id)
    assert engine.load().kv_free_tokens == engine.load().kv_total_tokens
    engine.check()


@KERNELS
def test_what_was_preempted_is_computed_again_from_what_was_kept() -> None:
    engine, other = small_span(kv_blocks=6), small_span(kv_blocks=6)
    rows = states(41)
    for each, name in ((engine, 2), (other, 2)):
        each.open(session(name, 40, 60))
        each.feed(session(2, 1, 2).id, 0, [7] * 40, rows[:40], sample_rows=1)
        run_out(each)
    engine.open(session(1, 60, 90))
    give(engine, 1, 60)
    assert run_out(engine) == {1: 60}
    assert engine.load().preemptions_total == 1
    engine.feed(session(2, 1, 2).id, 40, [7], rows[40:], sample_rows=1)
    assert not engine.step() and not engine.has_work, (
        "it waits for the earlier one, and asks for nothing meanwhile"
    )
    engine.close(session(1, 1, 2).id)
    other.feed(session(2, 1, 2).id, 40, [7], rows[40:], sample_rows=1)
    [again], [plain] = engine.step(), other.step()
    assert again.start == plain.start == 40 and torch.equal(again.hidden, plain.hidden)


# ---- what must be refused, and what fails alone ------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"id": SessionId("1" * 31)},
        {"id": SessionId("A" * 32)},
        {"max_tokens": 10**9},
        {"prompt_tokens": 0},
        {"prompt_tokens": 20},
        {"arrived_unix_s": float("nan")},
        {"arrived_unix_s": -1.0},
        {"sampling": None},
        {"sampling": SamplingParams(beam_width=2)},
        {"sampling": SamplingParams(prompt_logprobs=1)},
        {"sampling": SamplingParams(logit_bias={5000: 1.0})},
        {"sampling": SamplingParams(constraint=Constraint(kind="regex", text="("))},
    ],
)
def test_sessions_that_cannot_be_are_refused(wrong: dict[str, object]) -> None:
    engine = span("float32", 3, 6)
    fields = {"id": SessionId("1" * 32), "prompt_tokens": 4, "max_tokens": 20, "sampling": SamplingParams()}
    with pytest.raises(BadRequest):
        engine.open(SpanSession(**{**fields, **wrong}))
    engine.check()
    assert engine.load().sessions == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"start": 5},
        {"start": -1},
        {"token_ids": ()},
        {"token_ids": (1, 2, 2048)},
        {"token_ids": (1, -2, 3)},
        {"token_ids": (1,) * 17, "hidden": torch.zeros(17, 256)},
        {"hidden": None},
        {"hidden": torch.zeros(2, 256)},
        {"hidden": torch.zeros(3, 255)},
        {"hidden": torch.full((3, 256), float("nan"))},
        {"hidden": torch.zeros(3, 256, dtype=torch.int64)},
        {"sample_rows": 4},
        {"sample_rows": -1},
        {"draft_tokens": 1},
        {"sample_rows": 2, "draft_tokens": 2},
    ],
)
def test_feeds_that_cannot_be_are_refused_and_change_nothing(wrong: dict[str, object]) -> None:
    engine = span("float32", 3, 6)
    engine.open(session(1, 4, 20, sampling=GREEDY))
    id = session(1, 4, 20).id
    feed = {
        "start": 4,
        "token_ids": (1, 2, 3),
        "hidden": torch.zeros(3, 256),
        "sample_rows": 1,
        "draft_tokens": 0,
    }
    engine.feed(id, 0, (5, 6, 7, 8), states(4), sample_rows=0)
    with pytest.raises(BadRequest):
        engine.feed(id, **{**feed, **wrong})
    with pytest.raises(BadRequest):
        engine.rewind(id, 5)
    engine.check()
    assert engine.known_tokens(id) == 4
    engine.feed(id, **feed)
    assert [len(output.sampled) for output in engine.step()] == [0, 1]
    engine.close(id)


def test_who_is_not_here_is_not_found() -> None:
    engine, nobody = span("float32", 0, 3), SessionId("0" * 32)
    engine.close(nobody)
    with pytest.raises(NotFound):
        engine.feed(nobody, 0, (1,), None, sample_rows=0)
    with pytest.raises(NotFound):
        engine.known_tokens(nobody)
    with pytest.raises(BadRequest, match="do not end the model"):
        engine.compile(Constraint(kind="json_object"))


def test_a_session_that_leaves_its_language_fails_alone() -> None:
    chain = chain_of("float32", [0, 6])
    constrained = SAMPLINGS["constrained"]
    lost = chain.open(PROMPT[:4], constrained, out=(1000,))  # not what the expression allows
    kept = chain.open(PROMPT[:5], GREEDY)
    for id in (lost, kept):
        chain.feed(id, 0)
    chain.step(0)
    chain.arrive(0)
    [(id, failure)] = chain.hops[0].take_failures()
    assert id == lost and isinstance(failure, BadRequest)
    assert len(chain.asked[kept].answer) == 1
    chain.close(kept)


class Spoiled:
    """A decoder in which one thing can be broken for a step."""

    finds_best = False
    best = ()

    def __init__(self, decoder: Decoder) -> None:
        self.spec, self.blocks = decoder.spec, decoder.blocks
        self._decoder = decoder
        self.spoiled_row: int | None = None
        self.fails = False

    def forward(self, chunks, store, hidden=None, *, blocks=None):
        if self.fails:
            raise EngineFailure("a cable was pulled")
        result = self._decoder.forward(chunks, store, hidden, blocks=blocks)
        if self.spoiled_row is not None:
            result[self.spoiled_row] = float("inf")
        return result

    def non_finite(self) -> str:
        return ""


@pytest.fixture
def spoiled() -> tuple[SpanEngine, Spoiled]:
    checkpoint = open_checkpoint(TINY)
    blocks = range(2, 4)
    decoder = Spoiled(
        Decoder(checkpoint.spec, load_weights(checkpoint, blocks), device="cpu", dtype=torch.float32)
    )
    engine = SpanEngine(
        decoder=decoder,
        store=KvStore(checkpoint.spec, blocks, 16, 16, torch.float32, "cpu"),
        host_store=None,
        scheduler=Scheduler(policy_named("paged"), KvBlockPool(16, 16), None, StepLimits()),
        inputs=SpanInputs(24, 16, 256),
        tokenizer=None,
        eos_token_ids=frozenset(),
        max_model_tokens=256,
    )
    for number in (1, 2):
        engine.open(session(number, 4, 20))
        give(engine, number, 4)
    return engine, decoder


def test_activations_that_are_not_finite_end_their_session_alone(spoiled: tuple[SpanEngine, Spoiled]) -> None:
    engine, decoder = spoiled
    decoder.spoiled_row = 5
    assert [int(output.id, 16) for output in engine.step()] == [1]
    [(id, failure)] = engine.take_failures()
    assert int(id, 16) == 2 and isinstance(failure, EngineFailure) and "2:4" in failure.message
    engine.check()


def test_after_a_failed_step_the_engine_goes_on(spoiled: tuple[SpanEngine, Spoiled]) -> None:
    engine, decoder = spoiled
    engine.open(session(3, 4, 20))
    decoder.fails = True
    with pytest.raises(EngineFailure):
        engine.step()
    assert [int(id, 16) for id in engine.abort_running()] == [1, 2]
    decoder.fails = False
    give(engine, 3, 4)
    assert run_out(engine) == {3: 4}


# ---- loading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_the_span_that_ends_the_model_needs_a_tokenizer(dtype: str, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(TINY / name)
    options = replace(tiny_options(dtype), folder=tmp_path)
    for blocks in (range(2), range(2, 5)):
        assert load_span_engine(options, blocks).blocks == blocks
    with pytest.raises(BadSetup):
        load_span_engine(options, range(5, 6))


def test_a_span_reports_the_bytes_of_its_own_tensors() -> None:
    def bytes_of(blocks: range) -> int:
        seen: list[tuple[int, int]] = []
        load_span_engine(
            tiny_options("float32"), blocks, on_progress=lambda done, total: seen.append((done, total))
        )
        assert seen[-1][0] == seen[-1][1]
        return seen[-1][1]

    assert bytes_of(range(2, 4)) == 2 * bytes_of(range(2, 3)) < bytes_of(range(2))


@pytest.mark.parametrize(
    ("blocks", "changes"),
    [
        (range(5, 7), {}),
        (range(3, 3), {}),
        (range(0, 6, 2), {}),
        (range(6), {"policy": "orca"}),
        (range(2, 4), {"kv_cache_bytes": 1000}),
        (range(2, 4), {"max_model_tokens": 4096}),
    ],
)
def test_what_does_not_fit_together_is_not_loaded(blocks: range, changes: dict[str, object]) -> None:
    with pytest.raises(BadSetup):
        load_span_engine(replace(tiny_options("float32"), **changes), blocks)
