"""Operations, weights and cache of a span of blocks, counted from the model's shape.

Norms, biases, rotary positions and the router's choice are left out: together they are below one part in a hundred of
every model that plait knows.
"""

from collections import Counter
from dataclasses import dataclass, field

from plait.costs.formats import ACTIVATION_BYTES, KV_BYTES, KV_SCALE_BYTES, WEIGHT_BYTES, Formats
from plait.costs.work import StepWork
from plait.model import AttentionSpec, BlockSpec, MlpSpec, ModelSpec, MoeSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class OperationWork:
    """Arithmetic and memory traffic of one operation of a step."""

    name: str
    flops: float
    bytes: float
    rows: int
    """Rows of the matrix product: how well a device is used grows with them."""


@dataclass(frozen=True, slots=True)
class SpanShape:
    """One span of a model in given formats. The first span embeds, the last one has the head."""

    model: ModelSpec
    blocks: range
    formats: Formats
    _kinds: tuple[tuple[BlockSpec, int], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Comparing blocks costs far more than a step's arithmetic, so it is done once.
        kinds = Counter(self.model.blocks[block] for block in self.blocks)
        object.__setattr__(self, "_kinds", tuple(kinds.items()))

    @property
    def weight_bytes(self) -> int:
        """Memory of the span's matrices; a tied head is counted once, also where embedding and head are apart."""
        numbers = sum(
            count * (attention_weights(block.attention, self.model.hidden) + _held(block, self.model.hidden))
            for block, count in self.kinds()
        )
        ends = self.embeds + (self.decides and not (self.embeds and self.model.tied_head))
        numbers += ends * self.model.vocab_tokens * self.model.embedding_width
        return round(numbers * WEIGHT_BYTES[self.formats.weights])

    @property
    def kv_bytes_per_token(self) -> int:
        """Memory of one token's keys and values."""
        numbers = self.model.kv_elements_per_token(self.blocks)
        attentions = [self.model.blocks[block].attention for block in self.blocks]
        vectors = sum(each.kv_planes * each.cached_heads for each in attentions)
        kv = self.formats.kv
        return round(numbers * KV_BYTES[kv] + vectors * KV_SCALE_BYTES.get(kv, 0.0))

    @property
    def hidden_bytes_per_token(self) -> int:
        """One token's hidden state."""
        return round(self.model.hidden * ACTIVATION_BYTES[self.formats.activations])

    @property
    def query_bytes_per_token(self) -> int:
        """What one token sends to each other machine that holds keys of it: its queries, of all blocks of the span."""
        numbers = sum(count * spec.heads * spec.cached_dim for spec, count in self._attentions())
        return round(numbers * ACTIVATION_BYTES[self.formats.activations])

    @property
    def part_bytes_per_token(self) -> int:
        """What comes back for it: sums of values and two numbers a head, in float32 (`engine/partial.py`)."""
        numbers = sum(
            count * spec.heads * ((spec.latent.kv_rank if spec.latent else spec.value_dim) + 2)
            for spec, count in self._attentions()
        )
        return numbers * 4

    def _attentions(self) -> list[tuple[AttentionSpec, int]]:
        return [(block.attention, count) for block, count in self.kinds()]

    @property
    def embeds(self) -> bool:
        return self.blocks.start == 0

    @property
    def decides(self) -> bool:
        return self.blocks.stop == len(self.model.blocks)

    def kinds(self) -> tuple[tuple[BlockSpec, int], ...]:
        """The different blocks of the span and how many there are of each."""
        return self._kinds

    def operations(self, work: StepWork) -> tuple[OperationWork, ...]:
        """What one step computes: projections, attention and feed forward of the blocks, then the head."""
        hidden, formats = self.model.hidden, self.formats
        tokens = work.features.tokens
        each_weight, each_value = WEIGHT_BYTES[formats.weights], ACTIVATION_BYTES[formats.activations]
        result: list[OperationWork] = []
        for block, count in self.kinds():
            spec = block.attention
            weights = attention_weights(spec, hidden)
            result.append(
                OperationWork(
                    name="projections",
                    flops=count * 2.0 * tokens * weights,
                    bytes=count * (weights * each_weight + 4 * tokens * hidden * each_value),
                    rows=tokens,
                )
            )
            result.extend(self._attention(spec, count, work))
            result.append(self._feed_forward(block, count, tokens))
        if self.decides and work.sampled:
            matrix = self.model.vocab_tokens * self.model.embedding_width
            result.append(
                OperationWork(
                    name="head",
                    flops=2.0 * work.sampled * matrix,
                    bytes=matrix * each_weight + work.sampled * self.model.vocab_tokens * 4.0,
                    rows=work.sampled,
                )
            )
        return tuple(result)

    def attention(self, work: StepWork) -> tuple[OperationWork, ...]:
        """The attention of a step, which is a part of `operations`."""
        return tuple(
            operation
            for block, count in self.kinds()
            for operation in self._attention(block.attention, count, work)
        )

    def _attention(self, spec: AttentionSpec, count: int, work: StepWork) -> list[OperationWork]:
        """Of sequences that bring one token, and of those that bring more: devices do the two differently well."""
        kv_bytes = (
            spec.kv_planes
            * spec.cached_heads
            * (spec.cached_dim * KV_BYTES[self.formats.kv] + KV_SCALE_BYTES.get(self.formats.kv, 0.0))
        )
        width = 2 * spec.cached_dim if spec.latent else spec.head_dim + spec.value_dim
        features, result = work.features, list[OperationWork]()
        prompts = features.sequences - features.decodes
        for name, decodes, sequences, tokens in (
            ("decode_attention", True, features.decodes, features.decodes),
            ("prefill_attention", False, prompts, features.prefill_tokens),
        ):
            if sequences:
                pairs, read = _attended(work, spec.window_tokens or spec.chunk_tokens, decodes=decodes)
                result.append(
                    OperationWork(
                        name=name,
                        flops=count * 2.0 * pairs * spec.heads * width,
                        bytes=count * read * kv_bytes,
                        rows=round(tokens / sequences),
                    )
                )
        return result

    def _feed_forward(self, block: BlockSpec, count: int, tokens: int) -> OperationWork:
        hidden, parts = self.model.hidden, block.feed_forward
        each_weight = WEIGHT_BYTES[self.formats.weights]
        each_value = ACTIVATION_BYTES[self.formats.activations]
        rows = tokens
        if isinstance(parts, MlpSpec):
            read = used = float(mlp_weights(parts, hidden))
        else:
            expert = mlp_weights(parts.expert, hidden)
            shared = mlp_weights(parts.shared, hidden) if parts.shared else 0
            router = hidden * parts.experts
            hit = experts_hit(parts, tokens)
            read = hit * expert + shared + router
            used = parts.experts_per_token * expert + shared + router
            rows = max(1, round(tokens * parts.experts_per_token / hit))
        return OperationWork(
            name="feed_forward",
            flops=count * 2.0 * tokens * used,
            bytes=count * (read * each_weight + 2 * tokens * hidden * each_value),
            rows=rows,
        )


def attention_weights(spec: AttentionSpec, hidden: int) -> int:
    """Numbers in one block's attention matrices."""
    output = spec.heads * spec.value_dim * hidden
    if spec.latent is None:
        return hidden * (spec.heads + spec.kv_heads) * spec.head_dim + (
            hidden * spec.kv_heads * spec.value_dim + output
        )
    latent = spec.latent
    queries = spec.heads * spec.head_dim
    query = (
        hidden * latent.query_rank + latent.query_rank * queries if latent.query_rank else hidden * queries
    )
    down = hidden * (latent.kv_rank + latent.rope_dim)
    up = latent.kv_rank * spec.heads * (latent.nope_dim + spec.value_dim)
    return query + down + up + output


def mlp_weights(spec: MlpSpec, hidden: int) -> int:
    """Numbers in one MLP's matrices."""
    return (3 if spec.gated else 2) * hidden * spec.inner


def experts_hit(spec: MoeSpec, tokens: int) -> float:
    """Different experts that `tokens` tokens visit, expected where each chooses evenly and by itself."""
    return spec.experts * (1.0 - (1.0 - spec.experts_per_token / spec.experts) ** tokens)


def _held(block: BlockSpec, hidden: int) -> int:
    parts = block.feed_forward
    if isinstance(parts, MlpSpec):
        return mlp_weights(parts, hidden)
    shared = mlp_weights(parts.shared, hidden) if parts.shared else 0
    return parts.experts * mlp_weights(parts.expert, hidden) + shared + hidden * parts.experts


def _attended(work: StepWork, seen: int | None, *, decodes: bool) -> tuple[float, int]:
    """Pairs of query and key, and keys read, where a query sees at most its last `seen` tokens.

    Of the sequences with one new token if `decodes`, of the others if not.
    """
    features = work.features
    if seen is None and decodes:
        read = features.decode_context_tokens + features.decodes
        return read, read
    if seen is None:
        squares = features.prefill_chunk_squared + features.prefill_tokens
        read = features.context_tokens - features.decode_context_tokens + features.prefill_tokens
        return features.prefill_chunk_times_context + squares / 2, read
    pairs, read = 0.0, 0
    for new, context in zip(work.new_tokens, work.context_tokens, strict=True):
        if (new == 1) == decodes:
            growing = min(new, max(0, seen - context))  # rows that still see everything
            pairs += growing * (context + (growing + 1) / 2) + (new - growing) * seen
            read += new + min(context, seen - 1)
    return pairs, read
