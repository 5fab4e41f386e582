# pyright: standard
"""From logits to tokens, such that a row's token depends on that row alone.

The same request must give the same tokens alone, in any batch, after preemption and on another worker. Two
rules make it so:

1. The random number of a draw is a hash of (seed, position, sample index): no generator has a state.
2. Probabilities become integers: a token weighs floor(2^44 exp((x - max) / T)). Sums of integers do not
   depend on the order in which a device adds them, so totals, cut-offs and the drawn index are the same for a
   row in any batch. A token 2^-44 (5.7e-14) times as likely as the best weighs 0 and is never drawn.

All filters keep a top set of tokens, so each is a threshold on the weight: min_p keeps weights of at least
min_p times the largest; top_k those of at least the k-th; top_p those with less than top_p of the mass
strictly above them. Tokens that tie at a threshold are all kept, as in transformers for top_k. Order, as in
vLLM V1: bias, penalties, masks; temperature; min_p; top_k; top_p, each over what the ones before left.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from plait.errors import BadRequest, EngineFailure, ServingError
from plait.session import PositionLogprobs, SamplingParams, TokenLogprob

WEIGHT_BITS = 44  # 2^44 for the best of at most 2^18 tokens sums to below 2^62: no int64 total overflows
# Elements of one row chunk: bounds the int64 temporaries of a step to about 100 MB.
CHUNK_ELEMENTS = 4 * 2**20
# How many of the best tokens to look at first when looking for the cut of top_p; peaked rows need no full
# sort.
TOP_P_HEAD_TOKENS = 256

_NO_TOKENS: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What decides the token of one row of logits, besides the logits.

    `position` is that of the token to be drawn, counted in its sequence. `stop_token_ids` (the model's end
    tokens, unless ignored, and the request's own) are masked while fewer than `params.min_tokens` tokens are
    out. `allowed` holds one bit per token id, as int32 words, lowest bit first; None allows all.
    """

    params: SamplingParams
    seed: int
    position: int
    sample_index: int = 0
    prompt_token_ids: Sequence[int] | npt.NDArray[np.integer] = _NO_TOKENS
    output_token_ids: Sequence[int] | npt.NDArray[np.integer] = _NO_TOKENS
    stop_token_ids: Collection[int] = _NO_TOKENS
    allowed: npt.NDArray[np.int32] | None = None

    @property
    def holds_back_stop(self) -> bool:
        """Whether this row is too short to stop."""
        return bool(self.stop_token_ids) and len(self.output_token_ids) < self.params.min_tokens


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The token of one row; `logprobs` if the row asked for them."""

    token_id: int
    logprobs: PositionLogprobs | None = None


def sample_rows(logits: Tensor, rows: Sequence[SamplingRow], vocab_limit: int) -> list[SampledToken]:
    """Choose one token for each row.

    `logits` is float32 [rows, vocab] on any device and is not changed. Ids from `vocab_limit` on are padding
    of the model's vocabulary and never chosen. Ties of a greedy choice go to the lowest id. Log-probabilities
    are those of the unchanged logits over the ids below `vocab_limit`.

    Raises:
        BadRequest: a row's constraint leaves no token, so its request has asked for what cannot be.
        EngineFailure: a row has NaN or infinite logits.
    """
    raw = logits[:, :vocab_limit]
    processed = _apply_bias_penalties_masks(raw, rows)
    best, chosen = processed.max(dim=-1)
    _check_sampleable(best, rows)
    drawn = [index for index, row in enumerate(rows) if not row.params.greedy]
    if drawn:
        chosen = chosen.clone()
        for part in _chunks(drawn, processed.shape[1]):
            at = torch.tensor(part, device=logits.device)
            x = processed if len(part) == len(rows) else processed[at]
            chosen[at] = _draw(x, best[at], [rows[index] for index in part])
    token_ids: list[int] = chosen.tolist()
    reported = _report_logprobs(raw, rows, token_ids)
    return [SampledToken(token_id, reported.get(index)) for index, token_id in enumerate(token_ids)]


def sample_each(
    logits: Tensor, rows: Sequence[SamplingRow], vocab_limit: int
) -> list[SampledToken | ServingError]:
    """As `sample_rows`, but a row that cannot be sampled gives its error and leaves the others alone."""
    try:
        return list(sample_rows(logits, rows, vocab_limit))
    except (BadRequest, EngineFailure):
        sampled: list[SampledToken | ServingError] = []
        for index, row in enumerate(rows):
            try:
                sampled += sample_rows(logits[index : index + 1], [row], vocab_limit)
            except (BadRequest, EngineFailure) as failure:
                sampled.append(failure)
        return sampled


def take_best(token_id: int, logit: float, non_finite: Callable[[], str]) -> SampledToken | EngineFailure:
    """The greedy choice that a decoder made itself, if its logit is a number; `non_finite` says where it stopped."""
    if math.isfinite(logit):
        return SampledToken(token_id)
    where = non_finite()
    return EngineFailure(
        f"the largest logit is {logit}" + (f"; activations stopped being finite in {where}" if where else "")
    )


def takes_best_token(
    params: SamplingParams, *, output_tokens: int, stop_token_ids: Collection[int], constrained: bool
) -> bool:
    """Whether a next token is simply the most likely one: no other logit than the largest matters.

    `output_tokens` are out already; `constrained` if a mask will apply.
    """
    return (
        params.greedy
        and params.logprobs is None
        and not params.logit_bias
        and not params.penalised
        and not (stop_token_ids and output_tokens < params.min_tokens)
        and not constrained
    )


def ending_token_ids(params: SamplingParams, eos_token_ids: frozenset[int]) -> frozenset[int]:
    """All tokens that end an answer: its own, and the model's unless they are to be ignored."""
    own = frozenset(params.stop_token_ids or ())
    return own if params.ignore_eos else own | eos_token_ids


def check_logit_bias(params: SamplingParams, vocab_tokens: int) -> None:
    """Refuse a bias on a token that the model does not have.

    Raises:
        BadRequest: there is one.
    """
    for token_id in params.logit_bias or ():
        if token_id >= vocab_tokens:
            raise BadRequest(f"logit_bias names token {token_id}, beyond the vocabulary", param="logit_bias")


def uniform_bits(
    seeds: Sequence[int], positions: Sequence[int], sample_indices: Sequence[int]
) -> npt.NDArray[np.uint64]:
    """Hash (seed, position, sample index) to 64 random bits, the same on every machine and for ever.

    Three rounds of the output function of SplitMix64 (Steele, Lea, Flood 2014, figure 17; David Stafford's
    mix 13), one for each word of the key, each after adding the golden gamma so that zero is not a fixed
    point.
    """
    words = [
        np.array([value & _MASK64 for value in values], dtype=np.uint64)
        for values in (seeds, positions, sample_indices)
    ]
    state = np.zeros(len(seeds), dtype=np.uint64)
    for word in words:
        state = _mix64((state ^ word) + _GOLDEN_GAMMA)
    return state


def top_candidates(logits: Tensor, k: int) -> list[list[TokenLogprob]]:
    """The k most likely tokens of each row, best first, equal ones by token id.

    `logits` is float32 [rows, vocab]; fewer than k come back where fewer are possible.
    """
    return _best_of(logits, torch.log_softmax(logits.float(), dim=-1), k)


def _best_of(logits: Tensor, logprobs: Tensor, k: int) -> list[list[TokenLogprob]]:
    token_ids = _top_ids(logits, min(k, logits.shape[1]))
    values = logprobs.gather(1, token_ids).tolist()
    return [
        [TokenLogprob(token_id, value) for token_id, value in zip(ids, row, strict=True) if value > -np.inf]
        for ids, row in zip(token_ids.tolist(), values, strict=True)
    ]


def position_logprobs(
    logits: Tensor, token_ids: Sequence[int], tops: Sequence[int]
) -> list[PositionLogprobs]:
    """Log-probabilities of one given token per row, and of its `tops` most likely ones.

    `logits` is float32 [rows, vocab], as the model made them.
    """
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    wanted = torch.tensor(token_ids, device=logits.device)
    chosen = logprobs.gather(1, wanted[:, None])[:, 0].tolist()
    most = max(tops, default=0)
    best: list[list[TokenLogprob]] = _best_of(logits, logprobs, most) if most else [[] for _ in token_ids]
    return [
        PositionLogprobs(TokenLogprob(token_id, value), tuple(alternatives[:top]))
        for token_id, value, alternatives, top in zip(token_ids, chosen, best, tops, strict=True)
    ]


def reference_distribution(
    logits: npt.NDArray[np.float32], params: SamplingParams
) -> npt.NDArray[np.float64]:
    """Probabilities that `sample_rows` draws from after bias, penalties and masks: the slow, plain version.

    One row, float64 [vocab]; written after the definitions of the filters, to compare with.
    """
    if params.greedy:
        return np.eye(len(logits))[int(np.argmax(logits))]
    scores = (logits.astype(np.float64) - logits.max()) / params.temperature
    p = np.exp(scores) / np.exp(scores).sum()
    if params.min_p > 0:
        p = np.where(p >= params.min_p * p.max(), p, 0.0)
    if 0 < params.top_k < len(p):
        p = np.where(p >= np.sort(p)[-params.top_k], p, 0.0)
    p /= p.sum()
    if params.top_p < 1:
        above = np.array([p[p > value].sum() for value in p])
        p = np.where(above < params.top_p, p, 0.0)
    return p / p.sum()


_MASK64 = 2**64 - 1
_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd


def _mix64(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _chunks(indices: list[int], vocab: int) -> list[list[int]]:
    size = max(1, CHUNK_ELEMENTS // max(1, vocab))
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def _check_sampleable(best: Tensor, rows: Sequence[SamplingRow]) -> None:
    good = torch.isfinite(best).tolist()
    if all(good):
        return
    index = good.index(False)
    value = best[index].item()
    if rows[index].allowed is not None and value == -np.inf:
        raise BadRequest(
            f"at position {rows[index].position} the constraint of this answer allows no token, or has become too "
            "complex to follow; simplify it"
        )
    raise EngineFailure(
        f"row {index} of {len(rows)} cannot be sampled at position {rows[index].position}: the largest logit is "
        f"{value}; {good.count(False)} such rows in this step"
    )


def _apply_bias_penalties_masks(raw: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Return `raw` itself if no row changes anything, else a changed copy. [rows, vocab] both."""
    biased = [index for index, row in enumerate(rows) if row.params.logit_bias]
    penalised = [index for index, row in enumerate(rows) if row.params.penalised]
    masked = [index for index, row in enumerate(rows) if row.allowed is not None]
    held = [index for index, row in enumerate(rows) if row.holds_back_stop]
    if not (biased or penalised or masked or held):
        return raw
    logits = raw.clone()
    if biased:
        _add_bias(logits, rows, biased)
    if penalised:
        _penalise(logits, rows, penalised)
    if masked:
        _mask_disallowed(logits, rows, masked)
    free = [index for index in held if rows[index].allowed is None]
    pairs = [(index, token_id) for index in free for token_id in rows[index].stop_token_ids]
    if pairs:
        at, ids = _pair_tensors(pairs, logits)
        logits[at, ids] = -torch.inf
    return logits


def _pair_tensors(pairs: list[tuple[int, int]], logits: Tensor) -> tuple[Tensor, Tensor]:
    """Row and token indices of pairs, without the tokens that the vocabulary does not have."""
    table = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    table = table[(table[:, 1] >= 0) & (table[:, 1] < logits.shape[1])]
    both = torch.from_numpy(table).to(logits.device)
    return both[:, 0], both[:, 1]


def _add_bias(logits: Tensor, rows: Sequence[SamplingRow], biased: list[int]) -> None:
    vocab = logits.shape[1]
    entries = [
        (index, token_id, bias)
        for index in biased
        for token_id, bias in (rows[index].params.logit_bias or {}).items()
        if token_id < vocab
    ]
    at, ids = _pair_tensors([(index, token_id) for index, token_id, _ in entries], logits)
    logits[at, ids] += torch.tensor(
        [bias for _, _, bias in entries], dtype=logits.dtype, device=logits.device
    )


def _penalise(logits: Tensor, rows: Sequence[SamplingRow], penalised: list[int]) -> None:
    """Repetition penalty (Keskar et al. 2019, section 4.1) over prompt and output; presence and frequency
    over output.

    All as vLLM: the repetition penalty first, then frequency times count and presence once are subtracted.
    """
    vocab = logits.shape[1]
    seen_at: list[npt.NDArray[np.int64]] = []
    seen_ids: list[npt.NDArray[np.int64]] = []
    seen_factor: list[npt.NDArray[np.float32]] = []
    out_at: list[npt.NDArray[np.int64]] = []
    out_ids: list[npt.NDArray[np.int64]] = []
    out_minus: list[npt.NDArray[np.float32]] = []
    for index in penalised:
        params = rows[index].params
        output = np.asarray(rows[index].output_token_ids, dtype=np.int64)
        if params.repetition_penalty != 1:
            seen = np.concatenate([np.asarray(rows[index].prompt_token_ids, dtype=np.int64), output])
            seen = seen[(seen >= 0) & (seen < vocab)]
            seen_at.append(np.full(len(seen), index, dtype=np.int64))
            seen_ids.append(seen)
            seen_factor.append(np.full(len(seen), params.repetition_penalty, dtype=np.float32))
        if params.presence_penalty != 0 or params.frequency_penalty != 0:
            ids, counts = np.unique(output[output < vocab], return_counts=True)
            out_at.append(np.full(len(ids), index, dtype=np.int64))
            out_ids.append(ids)
            out_minus.append((params.presence_penalty + params.frequency_penalty * counts).astype(np.float32))
    if seen_at:
        at, ids, factor = (_joined(parts, logits) for parts in (seen_at, seen_ids, seen_factor))
        values = logits[at, ids]
        # A token seen twice appears twice here; both write the same value.
        logits[at, ids] = torch.where(values > 0, values / factor, values * factor)
    if out_at:
        at, ids, minus = (_joined(parts, logits) for parts in (out_at, out_ids, out_minus))
        logits[at, ids] -= minus


def _joined(parts: Sequence[npt.NDArray[np.generic]], like: Tensor) -> Tensor:
    return torch.from_numpy(np.concatenate(parts)).to(like.device)


def _mask_disallowed(logits: Tensor, rows: Sequence[SamplingRow], masked: list[int]) -> None:
    vocab = logits.shape[1]
    words = np.zeros((len(masked), -(-vocab // 32)), dtype=np.int32)
    for line, index in enumerate(masked):
        allowed = _without_stop(rows[index])[: words.shape[1]]
        words[line, : len(allowed)] = allowed
    packed = torch.from_numpy(words).to(logits.device)
    bits = (packed[:, :, None] >> torch.arange(32, dtype=torch.int32, device=logits.device)) & 1
    forbidden = bits.reshape(len(masked), -1)[:, :vocab] == 0  # [rows, vocab]
    at = torch.tensor(masked, device=logits.device)
    logits[at] = logits[at].masked_fill(forbidden, -torch.inf)


def _without_stop(row: SamplingRow) -> npt.NDArray[np.int32]:
    """The allowed tokens, less the stop tokens of a row that is too short, unless nothing else is allowed."""
    allowed = row.allowed
    assert allowed is not None
    if not row.holds_back_stop:
        return allowed
    without = allowed.view(np.uint32).copy()
    for token_id in row.stop_token_ids:
        if 0 <= token_id < 32 * len(without):
            without[token_id // 32] &= ~np.uint32(1 << (token_id % 32))
    return without.view(np.int32) if without.any() else allowed


def _draw(x: Tensor, best: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Draw one token per row by inverse transform. x: [rows, vocab] float32; returns int64 [rows]."""
    weights = _weights(x, best, rows)
    if any(row.params.min_p > 0 or row.params.top_k > 0 or row.params.top_p < 1 for row in rows):
        weights = _filtered(weights, rows)
    cumulative = weights.cumsum(dim=-1)  # [rows, vocab]
    bits = uniform_bits(
        [row.seed for row in rows], [row.position for row in rows], [row.sample_index for row in rows]
    )
    uniform = torch.from_numpy((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53).to(x.device)
    total = cumulative[:, -1]
    target = torch.minimum((uniform * total.double()).long(), total - 1)
    # The first token whose cumulative weight exceeds the target: one with a weight above zero.
    return torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]


def _weights(x: Tensor, best: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Unnormalised probabilities as integers, 2^WEIGHT_BITS for the best. int64 [rows, vocab]."""
    temperature = torch.tensor([row.params.temperature for row in rows], dtype=x.dtype, device=x.device)
    # In place, because allocating vocabulary-sized tensors costs more than computing with them.
    return (x - best[:, None]).div_(temperature[:, None]).exp_().mul_(2.0**WEIGHT_BITS).long()


def _filtered(weights: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Set the weights of tokens that min_p, top_k and top_p remove to zero."""
    device, vocab = weights.device, weights.shape[1]
    floor = torch.tensor(
        [max(1, int(np.ceil(row.params.min_p * 2.0**WEIGHT_BITS))) for row in rows], device=device
    )
    ranks = [row.params.top_k if 0 < row.params.top_k < vocab else 0 for row in rows]
    narrowed = [index for index, row in enumerate(rows) if row.params.top_p < 1]
    head_tokens = min(vocab, max(max(ranks), TOP_P_HEAD_TOKENS if narrowed else 0))
    if head_tokens == 0:
        return weights.where(weights >= floor[:, None], 0)
    head = _largest(weights, head_tokens)  # [rows, head_tokens], falling
    last = torch.tensor([rank - 1 if rank else 0 for rank in ranks], device=device)
    has_rank = torch.tensor([rank > 0 for rank in ranks], device=device)
    kth = head.gather(1, last[:, None])[:, 0]
    floor = torch.where(has_rank, torch.maximum(floor, kth), floor)
    weights = weights.where(weights >= floor[:, None], 0)
    if not narrowed:
        return weights
    top_p = torch.tensor([row.params.top_p for row in rows], dtype=torch.float64, device=device)
    mass = (weights.sum(dim=-1).double() * top_p).long().clamp_(min=1)
    at = torch.tensor(narrowed, device=device)
    head = head.where(head >= floor[:, None], 0)[at]
    cut = floor.clone()
    cut[at] = _cut_of_mass(head, mass[at])
    while head_tokens < vocab:
        at = at[head.sum(dim=-1) < mass[at]]
        if not len(at):
            break
        head_tokens = min(vocab, 16 * head_tokens)
        head = _largest(weights[at], head_tokens)
        cut[at] = _cut_of_mass(head, mass[at])
    return weights.where(weights >= cut[:, None], 0)


def _largest(weights: Tensor, count: int) -> Tensor:
    """The `count` largest weights of each row, falling."""
    if 4 * count >= weights.shape[1]:
        return weights.sort(dim=-1, descending=True).values[:, :count]
    return weights.topk(count, dim=-1, sorted=True).values


def _cut_of_mass(falling: Tensor, mass: Tensor) -> Tensor:
    """The smallest weight that has less than `mass` strictly above it. falling: [rows, n]; mass: [rows]."""
    above = falling.cumsum(dim=-1) - falling
    kept = ((above < mass[:, None]) & (falling > 0)).sum(dim=-1)
    return falling.gather(1, kept[:, None] - 1)[:, 0]


def _report_logprobs(
    raw: Tensor, rows: Sequence[SamplingRow], token_ids: list[int]
) -> dict[int, PositionLogprobs]:
    asked = [index for index, row in enumerate(rows) if row.params.logprobs is not None]
    if not asked:
        return {}
    counts = [rows[index].params.logprobs or 0 for index in asked]
    logits = raw if len(asked) == len(rows) else raw[torch.tensor(asked, device=raw.device)]
    reported = position_logprobs(logits, [token_ids[index] for index in asked], counts)
    return dict(zip(asked, reported, strict=True))


def _top_ids(x: Tensor, k: int) -> Tensor:
    """Ids of the k largest values of each row, falling, equal ones by id: [rows, k].

    `topk` leaves the order of ties open, and which of them are in: so ids are sorted before values, and rows with
    a tie at the k-th value are done again by unique keys.
    """
    values, ids = x.topk(k, dim=-1)
    ids, by_id = ids.sort(dim=-1)
    by_value = values.gather(1, by_id).sort(dim=-1, descending=True, stable=True).indices
    ids = ids.gather(1, by_value)
    tied = ((x >= values[:, -1:]).sum(dim=-1) > k).nonzero()[:, 0]
    if len(tied):
        ids[tied] = _top_ids_by_key(x[tied], k)
    return ids


def _top_ids_by_key(x: Tensor, k: int) -> Tensor:
    """As `_top_ids`: a key is a value's float32 bits in an order-preserving form, then the inverted id."""
    bits = (x.float() + 0.0).contiguous().view(torch.int32)  # adding 0 turns -0 into 0
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
    inverted = (2**32 - 1) - torch.arange(x.shape[1], device=x.device)
    keys = (ordered << 32) | inverted
    return (2**32 - 1) - (keys.topk(k, dim=-1, sorted=True).values & (2**32 - 1))
