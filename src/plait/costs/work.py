"""The work of one forward pass, as numbers that a cost model can use."""

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFeatures:
    """Sums over the sequences of a step, with n new tokens and c tokens of context each.

    `decodes` are the sequences with one new token. `attended_tokens` is the sum of n * (c + (n + 1) / 2): pairs of a
    query and a key that it sees.
    """

    sequences: int
    tokens: int
    decodes: int
    context_tokens: int
    decode_context_tokens: int
    chunk_times_context: int
    chunk_squared: int
    prefill_chunk_times_context: int
    prefill_chunk_squared: int
    attended_tokens: float

    @property
    def prefill_tokens(self) -> int:
        """New tokens of the sequences that bring more than one."""
        return self.tokens - self.decodes


@dataclass(frozen=True, slots=True)
class StepWork:
    """What one forward pass computes: for every sequence, the tokens that it brings and those already in its cache.

    `sampled` counts the rows that reach the head (one for most sequences that catch up with what is known, none for a
    prompt that goes on). Equal batches in another order are equal work, but not equal values.
    """

    new_tokens: tuple[int, ...]
    context_tokens: tuple[int, ...]
    sampled: int
    features: StepFeatures = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        assert len(self.new_tokens) == len(self.context_tokens), "each sequence has new tokens and a context"
        assert all(new > 0 for new in self.new_tokens), "a sequence of a step brings at least one token"
        assert all(context >= 0 for context in self.context_tokens), "a context cannot be negative"
        assert self.sampled >= 0, "a number of sampled rows cannot be negative"
        object.__setattr__(self, "features", _features(self.new_tokens, self.context_tokens))

    @staticmethod
    def of(chunks: Iterable[tuple[int, int]], *, sampled: int) -> "StepWork":
        """From (new tokens, context tokens) of each sequence."""
        pairs = tuple(chunks)
        return StepWork(tuple(new for new, _ in pairs), tuple(context for _, context in pairs), sampled)


def _features(new_tokens: tuple[int, ...], context_tokens: tuple[int, ...]) -> StepFeatures:
    tokens = decodes = context = decode_context = times = squared = 0
    for new, cached in zip(new_tokens, context_tokens, strict=True):
        tokens += new
        context += cached
        times += new * cached
        squared += new * new
        if new == 1:
            decodes += 1
            decode_context += cached
    return StepFeatures(
        sequences=len(new_tokens),
        tokens=tokens,
        decodes=decodes,
        context_tokens=context,
        decode_context_tokens=decode_context,
        chunk_times_context=times,
        chunk_squared=squared,
        prefill_chunk_times_context=times - decode_context,
        prefill_chunk_squared=squared - decodes,
        attended_tokens=times + (squared + tokens) / 2,
    )
