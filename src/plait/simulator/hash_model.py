# pyright: standard
"""A model that costs microseconds and forgives nothing: hidden states are hashes of all that led to them.

A block writes one word for each position into its KV pages, and its output at a position is a hash of its input there
and of the words of all positions up to it, read back from the pages by block table. So any input that is wrong,
missing, stale or doubled, and any KV block that two sequences share by mistake, changes every later token (with
probability 1 - 1/`_ROWS` each). All arithmetic is exact, so a replay in other batches gives the same bits.

The scheduler, the KV blocks, the kept inputs and the sampler are the real ones: this is a `SpanDecoder` for the real
`SpanEngine`. A hidden state is one word of 64 bits as four float32, 16 bits each. Answers use few different tokens, so
that prompts repeat themselves and guesses by prompt lookup are right about as often as wrong.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import plait.model
from plait.engine import KvExtents, SequenceChunk, SpanDecoder, SpanEngine, SpanInputs, SpanSession, Tokenizer
from plait.errors import EngineFailure
from plait.ids import SessionId
from plait.kvcache import KvBlockPool
from plait.model import AttentionSpec, BlockSpec, MlpSpec, ModelSpec, NormSpec
from plait.scheduling import Scheduler, StepLimits, policy_named
from plait.session import GenerationRequest, to_wire_sampling
from plait.worker import SwarmModel

Words = NDArray[np.uint64]
SomeEngine = TypeVar("SomeEngine", bound=SpanEngine)

MODEL_BLOCKS = 4
MAX_MODEL_TOKENS = 1024
KV_BLOCK_TOKENS = 8
EOS_TOKEN_IDS = frozenset({0, 4})
_VOCAB = 2048  # of tiny, whose tokenizer this model has
_HIDDEN = 4
_SPOKEN = range(5, 15)  # the tokens that answers are made of
_ROWS = 509
_NORM = NormSpec(kind="rms", eps=1e-6)
_BLOCK = BlockSpec(
    placement="pre",
    norm=_NORM,
    attention=AttentionSpec(heads=1, kv_heads=1, head_dim=1, value_dim=1, scale=1.0),
    feed_forward=MlpSpec(inner=1, activation="relu"),
)
_SPEC = ModelSpec(
    family="hashes",
    vocab_tokens=_VOCAB,
    hidden=_HIDDEN,
    embedding_width=_HIDDEN,
    blocks=(_BLOCK,) * MODEL_BLOCKS,
    max_model_tokens=MAX_MODEL_TOKENS,
    tied_head=True,
    final_norm=_NORM,
)


class HashDecoder:
    """Computes a span of the model of hashes. `fails` makes its next pass raise, once."""

    finds_best = False
    best: Sequence[Sequence[tuple[int, float]]] = ()

    def __init__(self, blocks: range) -> None:
        self.spec = _SPEC
        self.blocks = blocks
        self.fails = False

    def forward(
        self,
        chunks: Sequence[SequenceChunk],
        store: KvExtents,
        hidden: Tensor | None = None,
        *,
        blocks: range | None = None,
    ) -> Tensor:
        """As `Decoder.forward`.

        Raises:
            EngineFailure: it was told to fail.
        """
        if self.fails:
            self.fails = False
            raise EngineFailure("the decoder was told to fail")
        blocks = self.blocks if blocks is None else blocks
        words = store.extents.numpy().view(np.uint64)
        pages = words.reshape(store.kv_blocks, len(self.blocks), store.block_tokens)
        outs: list[Words] = []
        first = 0
        for chunk in chunks:
            count = len(chunk.token_ids)
            if blocks.start == 0:
                states = _mixed(np.array(chunk.token_ids, np.uint64) + _SALTS[-1])
            else:
                assert hidden is not None
                states = _words_of(hidden[first : first + count])
            first += count
            for block in blocks:
                states = _block(states, chunk, pages[:, block - self.blocks.start], _SALTS[block])
            outs.append(states if blocks.stop < MODEL_BLOCKS else states[count - chunk.logit_rows :])
        flat = np.concatenate(outs)
        if blocks.stop < MODEL_BLOCKS:
            return torch.from_numpy(flat.view(np.uint16).reshape(-1, _HIDDEN).astype(np.float32))
        return torch.from_numpy(_logits()[(flat % np.uint64(_ROWS)).astype(np.int64)])

    def non_finite(self) -> str:
        """Nothing: what is computed here is finite."""
        return ""


def hash_engine(
    blocks: range,
    *,
    kv_blocks: int,
    swap_blocks: int = 0,
    step_tokens: int = 256,
    max_sessions: int = 64,
    engine_class: type[SomeEngine] = SpanEngine,
) -> SomeEngine:
    """A real engine for a span of the model of hashes; `kv_blocks` KV blocks, and `swap_blocks` in host memory."""

    def store(count: int) -> KvExtents:
        elements = len(blocks) * KV_BLOCK_TOKENS
        return KvExtents(blocks, count, KV_BLOCK_TOKENS, elements, torch.int64, "cpu")

    decoder: SpanDecoder = HashDecoder(blocks)
    return engine_class(
        decoder=decoder,
        store=store(kv_blocks),
        host_store=store(swap_blocks) if swap_blocks else None,
        scheduler=Scheduler(
            policy_named("paged"),
            KvBlockPool(kv_blocks, KV_BLOCK_TOKENS),
            KvBlockPool(swap_blocks, KV_BLOCK_TOKENS) if swap_blocks else None,
            StepLimits(
                step_tokens=step_tokens,
                max_running_sequences=max_sessions,
                max_waiting=max_sessions,
                preemption="swap" if swap_blocks else "recompute",
            ),
        ),
        inputs=SpanInputs(kv_blocks + kv_blocks // 2, KV_BLOCK_TOKENS, _HIDDEN),
        tokenizer=_tokenizer() if blocks.stop == MODEL_BLOCKS else None,
        eos_token_ids=EOS_TOKEN_IDS,
        max_model_tokens=min(MAX_MODEL_TOKENS, kv_blocks * KV_BLOCK_TOKENS),
    )


@cache
def hash_model() -> SwarmModel:
    """What a gateway knows of it."""
    return SwarmModel(
        fingerprint="hashes",
        blocks=MODEL_BLOCKS,
        vocab_tokens=_VOCAB,
        max_model_tokens=MAX_MODEL_TOKENS,
        eos_token_ids=EOS_TOKEN_IDS,
        tokenizer=_tokenizer(),
    )


def some_prompt(rng: np.random.Generator, tokens: int) -> tuple[int, ...]:
    """A prompt of the tokens that answers are made of."""
    return tuple(int(token_id) for token_id in rng.choice(np.arange(_SPOKEN.start, _SPOKEN.stop), tokens))


def true_answer(request: GenerationRequest) -> tuple[tuple[int, ...], ...]:
    """What one engine with the whole model answers, token by token: the token ids of each sample."""
    return tuple(_true_sample(request, index) for index in range(request.sampling.n))


def _true_sample(request: GenerationRequest, index: int) -> tuple[int, ...]:
    sampling = request.sampling
    assert sampling.max_tokens is not None and sampling.seed is not None
    prompt = request.prompt_token_ids
    stops = to_wire_sampling(sampling, seed=0, sample_index=0, end_token_ids=EOS_TOKEN_IDS).stop_token_ids
    engine = hash_engine(range(MODEL_BLOCKS), kv_blocks=MAX_MODEL_TOKENS // KV_BLOCK_TOKENS)
    id = SessionId("0" * 32)
    engine.open(
        SpanSession(
            id=id,
            max_tokens=len(prompt) + sampling.max_tokens,
            prompt_tokens=len(prompt),
            sampling=sampling,
            seed=sampling.seed,
            sample_index=index,
        )
    )
    token_ids = list(prompt)
    start = 0
    while len(token_ids) < len(prompt) + sampling.max_tokens:
        engine.feed(id, start, token_ids[start:], None, sample_rows=1)
        start = len(token_ids)
        while len(token_ids) == start:
            token_ids += [token.token_id for output in engine.step() for token in output.sampled]
        if token_ids[-1] in stops:
            break
    return tuple(token_ids[len(prompt) :])


@cache
def _tokenizer() -> Tokenizer:
    return Tokenizer(Path(plait.model.__file__).parent / "tiny", model_vocab_tokens=_VOCAB)


@cache
def _logits() -> NDArray[np.float32]:
    """Logits [_ROWS, vocab]: in each row a few tokens are likely, in one of thirty also an end token."""
    rng = np.random.default_rng(5)
    logits = np.full((_ROWS, _VOCAB), -30.0, np.float32)
    for row in logits:
        row[rng.choice(np.arange(_SPOKEN.start, _SPOKEN.stop), 3, replace=False)] = rng.normal(0, 1, 3)
    logits[::30, min(EOS_TOKEN_IDS)] = 1.0
    return logits


def _block(states: Words, chunk: SequenceChunk, pages: Any, salt: np.uint64) -> Words:
    """One block over one chunk's states [tokens]; `pages` [kv_blocks, block_tokens] are this block's own."""
    end = chunk.start + len(chunk.token_ids)
    positions = np.arange(chunk.start, end)
    table = np.asarray(chunk.kv_blocks, np.int64)
    block_tokens = pages.shape[1]
    pages[table[positions // block_tokens], positions % block_tokens] = _mixed(states + salt)
    held = pages[table[: -(-end // block_tokens)]].reshape(-1)[:end]
    seen = np.cumsum(held * _WEIGHTS[:end])[chunk.start :]
    return _mixed(states ^ (seen + salt))


def _words_of(hidden: Tensor) -> Words:
    return np.ascontiguousarray(hidden.numpy()).astype(np.uint16).view(np.uint64).reshape(-1)


def _mixed(words: Words) -> Words:
    """A bijection of 64-bit words in which every bit of the result depends on every bit given (splitmix64's)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


_SALTS: Words = _mixed(np.arange(1, MODEL_BLOCKS + 2, dtype=np.uint64))
_WEIGHTS: Words = _mixed(np.arange(1, MAX_MODEL_TOKENS + 1, dtype=np.uint64)) | np.uint64(1)
