"""The kernels' decoder computes what torch's does, and the same bits whatever else is in the batch."""

import itertools
from dataclasses import dataclass, field, replace

import pytest
import torch
import zoo
from zoo import BLOCK_TOKENS, LENGTHS, chunk, prompt

import plait.engine.layers as layers
from plait.engine import native
from plait.engine.decoder import Decoder
from plait.engine.kernel_kv import KernelKvStore
from plait.engine.loader import Weights, load_weights
from plait.engine.packed import load_packed
from plait.engine.partial import Partial
from plait.engine.remote_kv import PartialAsk
from plait.errors import BadRequest, BadSetup
from plait.kernels import native_available
from plait.model import SlotKey

pytestmark = pytest.mark.skipif(not native_available, reason="plait was installed without its CPU kernels")

# Heads of 24 dimensions are for torch alone: here every family has heads that the kernels take.
WIDER = {
    name: (kind, {**settings, "head_dim": 32} if settings.get("head_dim") == 24 else settings)
    for name, (kind, settings) in zoo.VARIANTS.items()
}
OUTSIDE = {"deepseek_v2", "deepseek_v2_greedy", "deepseek_v3", "opt_350m", "falcon_rw"}
INSIDE = [name for name in WIDER if name not in OUTSIDE]
FORMATS = ("bf16", "int8", "int4", "int4-g128")

# The reference rounds what the kernels round. The first token of a sequence sees itself alone, with a weight of 1:
# every rounding falls alike. Later a weight near the middle may fall to the other side, because attention's
# exponential is good to 2^-18, and from there on roundings are independent, and these checkpoints amplify them.
SAME = 1e-5
ROUNDED_APART = 6e-2


@dataclass
class Paged:
    """Sequences over one decoder and its store, with block tables handed out in a scattered order."""

    decoder: native.NativeDecoder
    kv_format: str = "bf16"
    kv_blocks: int = 64
    free: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        spec, blocks = self.decoder.spec, self.decoder.blocks
        self.store = KernelKvStore(spec, blocks, self.kv_blocks, BLOCK_TOKENS, self.kv_format)
        # What nobody wrote must not matter: these are not-a-number in bfloat16 and float32.
        self.store.extents.fill_(0xFF)
        self.free = torch.randperm(self.kv_blocks, generator=torch.Generator().manual_seed(3)).tolist()

    def table(self, tokens):
        return [self.free.pop() for _ in range(-(-tokens // BLOCK_TOKENS))]

    def run(self, *chunks, hidden=None):
        return self.decoder.forward(chunks, self.store, hidden)


def native_decoder(checkpoint, format="bf16", *, threads=1, kv_format="bf16", blocks=None):
    weights = load_packed(checkpoint, blocks=blocks, format=format, threads=1)
    return native.NativeDecoder(checkpoint.spec, weights, threads=threads, kv_format=kv_format)


@pytest.fixture(scope="session")
def wider(tiny_checkpoints, tmp_path_factory):
    """name -> TinyCheckpoint with heads that the kernels take."""
    folder = tmp_path_factory.mktemp("wider")
    written = {}

    def checkpoint(name):
        if WIDER[name] == zoo.VARIANTS[name]:
            return tiny_checkpoints(name)
        if name not in written:
            written[name] = zoo.write(name, folder / name, WIDER)
        return written[name]

    return checkpoint


@pytest.fixture
def rounding_reference(monkeypatch):
    """Make torch's decoder, in float64, round to bfloat16 what the kernels round.

    That is the inputs of matrices; queries, keys, values and attention's weights before they are normalised.
    """

    def rounded(tensor):
        return tensor.bfloat16().to(tensor.dtype)

    plain_linear = layers.Linear.__call__

    def linear(self, hidden):
        return plain_linear(self, rounded(hidden))

    def attend(query, keys, values, group, scale, softcap=None, sinks=None):
        sequences, new, heads, dim = query.shape
        kv_heads = keys.shape[1]
        queries = rounded(query).view(sequences, new, kv_heads, -1, dim).permute(0, 2, 3, 1, 4)
        scores = queries @ rounded(keys)[:, :, None].transpose(-1, -2) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if group.causal:
            later = torch.ones(new, scores.shape[-1], dtype=torch.bool).triu_(1)
            scores = scores.masked_fill(later, float("-inf"))
        elif group.bias is not None:
            scores = scores + group.bias
        largest = scores.amax(dim=-1, keepdim=True)
        sink = None if sinks is None else sinks.to(scores.dtype).view(1, kv_heads, -1, 1, 1)
        largest = largest if sink is None else torch.maximum(largest, sink)
        weights = torch.exp(scores - largest)
        total = weights.sum(dim=-1, keepdim=True)
        total = total if sink is None else total + torch.exp(sink - largest)
        attended = rounded(weights) @ rounded(values)[:, :, None] / total
        return attended.permute(0, 3, 1, 2, 4).reshape(sequences * new, heads, -1)

    def run_expert(self, expert, rows):
        up, down = self._experts_up, self._experts_down
        inner = torch.nn.functional.linear(
            rounded(rows), up.weight[expert], None if up.bias is None else up.bias[expert]
        )
        inner = layers._activated(inner, self._spec.expert)
        return torch.nn.functional.linear(
            rounded(inner), down.weight[expert], None if down.bias is None else down.bias[expert]
        )

    monkeypatch.setattr(layers.Linear, "__call__", linear)
    monkeypatch.setattr(layers, "attend", attend)
    monkeypatch.setattr(layers.FeedForward, "_run_expert", run_expert)

    exact = ("router", "positions")

    def reference(tiny):
        weights = Weights(
            spec=tiny.checkpoint.spec,
            blocks=tiny.checkpoint.spec.all_blocks,
            tensors={
                key: rounded(tensor)
                if key.kind == "weight" and tensor.dim() > 1 and key.slot not in exact
                else tensor
                for key, tensor in load_weights(tiny.checkpoint, None, torch.float64, "cpu").tensors.items()
            },
        )
        decoder = Decoder(tiny.checkpoint.spec, weights, device="cpu", dtype=torch.float64)
        return zoo.Paged(decoder, dtype=torch.float64)

    return reference


@pytest.mark.parametrize("name", INSIDE)
def test_every_family_computes_what_torch_computes(name, wider, rounding_reference):
    tiny = wider(name)
    ours, theirs = Paged(native_decoder(tiny.checkpoint)), rounding_reference(tiny)
    errors = []
    for length in LENGTHS:
        ids = prompt(length)
        mine = ours.run(chunk(ids, 0, length, ours.table(length)))
        other = theirs.run(chunk(ids, 0, length, theirs.table(length)))
        assert mine.dtype == torch.float32 and mine.shape == (length, zoo.VOCAB)
        errors.append((mine.double() - other).abs().amax(dim=-1) / other.std())
    error = torch.cat(errors)
    if name != "gpt_oss":  # its sink takes part of the weight
        assert min(float(each[0]) for each in errors) < SAME
    assert float(error.median()) < ROUNDED_APART, error
    mixture = "moe" in name or name in (
        "mixtral",
        "llama4",
        "gpt_oss",
    )  # a router may choose another expert at a near tie
    assert float(error.quantile(0.9 if mixture else 1.0)) < 4 * ROUNDED_APART, error


@pytest.mark.parametrize("name", INSIDE)
def test_quantised_weights_stay_near(name, wider):
    tiny = wider(name)
    ids = prompt(40)
    exact = tiny.reference_logits(ids)
    for format, bound in (("int8", 0.12), ("int4", 0.6)):
        paged = Paged(native_decoder(tiny.checkpoint, format))
        error = paged.run(chunk(ids, 0, 40, paged.table(40))) - exact
        assert float(error.double().pow(2).mean().sqrt() / exact.double().std()) < bound, format


@pytest.mark.parametrize("kv_format", ("bf16", "int8"))
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gemma2", "gpt_oss", "bloom"])
def test_logits_are_the_same_bits_in_any_batch_chunking_and_thread_count(name, format, kv_format, wider):
    checkpoint = wider(name).checkpoint
    prompts = [prompt(length) for length in LENGTHS]
    alone = []
    decoder = native_decoder(checkpoint, format, kv_format=kv_format)
    for ids in prompts:
        paged = Paged(decoder, kv_format)
        alone.append(paged.run(chunk(ids, 0, len(ids), paged.table(len(ids)))))
    for threads in (1, 2, 3):
        decoder = native_decoder(checkpoint, format, threads=threads, kv_format=kv_format)
        paged = Paged(decoder, kv_format)
        tables = [paged.table(len(ids)) for ids in prompts]
        together = paged.run(
            *(chunk(ids, 0, len(ids), table) for ids, table in zip(prompts, tables, strict=True))
        )
        assert torch.equal(together, torch.cat(alone))
        # Chunks of one token, across pages and windows; then the rest beside another prompt's start.
        paged = Paged(decoder, kv_format)
        ids, other = prompts[-1], prompts[1]
        table = paged.table(len(ids))
        bounds = [0, 7, 8, 9, 23, 32, 75, 96]
        parts = [paged.run(chunk(ids, start, stop, table)) for start, stop in itertools.pairwise(bounds)]
        beside = paged.run(
            chunk(other, 0, len(other), paged.table(len(other))), chunk(ids, 96, len(ids), table)
        )
        assert torch.equal(beside[: len(other)], alone[1])
        assert torch.equal(torch.cat([*parts, beside[len(other) :]]), alone[-1])


def test_a_sequence_cut_along_its_keys_gives_the_same_bits(tmp_path):
    tiny = zoo.write("long", tmp_path / "long", {"long": ("llama", zoo._small(max_position_embeddings=4096))})
    ids = prompt(2100)
    for kv_format in ("bf16", "int8"):
        logits = []
        for threads in (1, 3, 8):  # 2 KV heads: one thread takes them whole, three and eight cut them
            decoder = native_decoder(tiny.checkpoint, threads=threads, kv_format=kv_format)
            paged = Paged(decoder, kv_format, kv_blocks=140)
            table = paged.table(len(ids))
            paged.run(chunk(ids, 0, len(ids) - 1, table, rows=0))
            logits.append(paged.run(chunk(ids, len(ids) - 1, len(ids), table)))
        whole = Paged(native_decoder(tiny.checkpoint, kv_format=kv_format), kv_format, kv_blocks=140)
        logits.append(whole.run(chunk(ids, 0, len(ids), whole.table(len(ids)), rows=1)))
        assert all(torch.equal(one, logits[0]) for one in logits)


def test_spans_chained_equal_the_whole_bit_for_bit(wider):
    checkpoint = wider("llama").checkpoint
    whole = Paged(native_decoder(checkpoint))
    spans = [Paged(native_decoder(checkpoint, blocks=blocks)) for blocks in (range(1), range(1, 2))]
    ids = prompt(40)
    both = [chunk(ids, 0, 40, whole.table(40)), chunk(prompt(23), 0, 23, whole.table(23))]
    hidden = spans[0].run(*both)
    assert hidden.shape == (63, checkpoint.spec.hidden)
    assert torch.equal(spans[1].run(*both, hidden=hidden), whole.run(*both))


def test_best_tokens_are_those_of_the_logits(wider):
    checkpoint = wider("llama").checkpoint
    for threads in (1, 3):
        paged = Paged(native_decoder(checkpoint, threads=threads))
        ids, other = prompt(40), prompt(23)
        table, second = paged.table(40), paged.table(23)
        full = paged.run(chunk(ids, 0, 40, table, rows=1), chunk(other, 0, 23, second, rows=1))
        asked = chunk(ids, 39, 40, table, rows=1)
        asked = replace(asked, top_logits=5)
        rows = paged.run(asked, chunk(other, 22, 23, second, rows=1))
        assert torch.equal(rows, full[1:])
        values, ids_of_best = full[0].topk(5)
        assert paged.decoder.best == [list(zip(ids_of_best.tolist(), values.tolist(), strict=True))]


def test_ids_that_pad_the_vocabulary_are_never_the_best(wider):
    checkpoint = wider("llama").checkpoint
    weights = load_packed(checkpoint, format="bf16", threads=1)
    decoder = native.NativeDecoder(checkpoint.spec, weights, threads=2, token_limit=100)
    paged = Paged(decoder)
    asked = replace(chunk(prompt(23), 0, 23, paged.table(23), rows=1), top_logits=200)
    paged.run(asked)
    assert sorted(id for id, _ in decoder.best[0]) == list(range(100))


def test_a_value_that_is_not_finite_is_reported_with_its_place(wider):
    checkpoint = wider("llama").checkpoint
    for format in FORMATS:
        weights = load_packed(checkpoint, format=format, threads=1)
        weights.small[SlotKey(1, "attention_in_norm")][3] = float("inf")
        paged = Paged(native.NativeDecoder(checkpoint.spec, weights, threads=1))
        logits = paged.run(chunk(prompt(5), 0, 5, paged.table(5)))
        assert "hosted block 1" in paged.decoder.non_finite()
        assert logits.isnan().all(), format


@pytest.mark.parametrize("name", sorted(OUTSIDE))
def test_models_that_the_kernels_cannot_run_are_named(name, tiny_checkpoints):
    checkpoint = tiny_checkpoints(name).checkpoint
    assert native.unsupported(checkpoint.spec)
    with pytest.raises(BadSetup, match="CPU kernels cannot run this model"):
        native_decoder(checkpoint)


class Nearby:
    """Holders in this process, without weights; borrowed number n is block n // 3 of holder n % 3."""

    def __init__(self, paged: Paged) -> None:
        spec, blocks = paged.decoder.spec, paged.decoder.blocks
        self.first = paged.kv_blocks
        self.stores = [KernelKvStore(spec, blocks, 64, BLOCK_TOKENS, paged.kv_format) for _ in range(3)]
        self.asked: list[PartialAsk] = []
        self.moved = 0
        paged.store.remote = self

    def move(self, paged: Paged, table: list[int], index: int) -> None:
        """Move a block of a table away; what it leaves behind must not be looked at."""
        holder, place = self.moved % 3, self.moved // 3
        self.stores[holder].write_blocks([place], paged.store.read_blocks([table[index]]))
        paged.store.extents[table[index]] = 0xFF
        table[index] = self.first + self.moved
        self.moved += 1

    def ask(self, asked: PartialAsk) -> "Nearby":
        self.asked.append(asked)
        return self

    def take(self) -> list[Partial]:
        asked = self.asked[-1]
        numbers = [kv_block - self.first for kv_block in asked.kv_blocks]
        parts = []
        for holder in dict.fromkeys(number % 3 for number in numbers):
            mine = [index for index, number in enumerate(numbers) if number % 3 == holder]
            parts.append(
                self.stores[holder].attend(
                    asked.block,
                    [numbers[index] // 3 for index in mine],
                    [asked.starts[index] for index in mine],
                    asked.position,
                    asked.query,
                )
            )
        return parts


def logits_by_parts(
    decoder: native.NativeDecoder, kv_format: str, cuts: list[int], away: float
) -> torch.Tensor:
    """All logits of a prompt in chunks and, with it, of a short one; after each chunk full blocks move away."""
    paged = Paged(decoder, kv_format)
    near = Nearby(paged)
    tokens, short = prompt(90), prompt(20, seed=1)
    table, short_table = paged.table(len(tokens)), paged.table(len(short))
    paged.run(chunk(short, 0, 10, short_table))
    generator = torch.Generator().manual_seed(7)
    rows = []
    for start, stop in itertools.pairwise([0, *cuts, len(tokens)]):
        chunks = [chunk(tokens, start, stop, table)]
        if start == cuts[0]:
            chunks.insert(0, chunk(short, 10, 20, short_table))
        rows.append(paged.run(*chunks))
        for index in range(stop // BLOCK_TOKENS):
            leaves = index == 0 or torch.rand(1, generator=generator).item() < away
            if away and leaves and table[index] < paged.kv_blocks:
                near.move(paged, table, index)
    assert bool(near.asked) == bool(away)
    return torch.cat(rows)


@pytest.mark.parametrize("kv_format", ("bf16", "int8"))
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "bloom", "llama4", "qwen3_moe"])
def test_logits_by_parts_are_the_same_bits_wherever_blocks_lie(name, kv_format, wider):
    """Windows, chunks, sinks, soft caps, ALiBi; chunks of prompts and single tokens; three holders."""
    checkpoint = wider(name).checkpoint
    weights = load_packed(checkpoint, format="int8" if kv_format == "int8" else "bf16", threads=1)

    def decoder(threads):
        return native.NativeDecoder(
            checkpoint.spec, weights, threads=threads, kv_format=kv_format, by_parts=True
        )

    cuts = [33, 70, 71, 72, 88, 89]
    here = logits_by_parts(decoder(1), kv_format, cuts, away=0.0)
    for threads, away in ((1, 0.5), (3, 0.5), (2, 1.0)):
        assert torch.equal(logits_by_parts(decoder(threads), kv_format, cuts, away), here)
    assert torch.equal(logits_by_parts(decoder(2), kv_format, cuts, away=0.0), here)


@pytest.mark.parametrize("kv_format", ("bf16", "int8"))
@pytest.mark.parametrize("name", [name for name in INSIDE if name != "gpt_oss"])  # which has sinks
def test_attention_by_parts_of_a_token_that_sees_itself_alone_rounds_nothing(name, kv_format, wider):
    """Longer contexts are compared in tests/kernels/test_attention_parts.py: here roundings are amplified."""
    checkpoint = wider(name).checkpoint
    weights = load_packed(checkpoint, format="bf16", threads=1)
    results = []
    for by_parts in (False, True):
        decoder = native.NativeDecoder(
            checkpoint.spec, weights, threads=1, kv_format=kv_format, by_parts=by_parts
        )
        paged = Paged(decoder, kv_format)
        results.append(paged.run(chunk(prompt(90), 0, 90, paged.table(90)))[:1])
    assert zoo.difference(results[1], results[0]) < SAME


def test_a_decoder_that_does_not_attend_by_parts_refuses_borrowed_blocks(wider):
    checkpoint = wider("llama").checkpoint
    paged = Paged(native_decoder(checkpoint))
    near = Nearby(paged)
    table = paged.table(40)
    paged.run(chunk(prompt(40), 0, 32, table))
    near.move(paged, table, 0)
    with pytest.raises(ValueError, match="attention by parts"):
        paged.run(chunk(prompt(40), 32, 40, table))
    own = KernelKvStore(checkpoint.spec, checkpoint.spec.all_blocks, 4, BLOCK_TOKENS, "bf16")
    query = torch.zeros(1, 4, 16)
    with pytest.raises(BadRequest, match="before the query"):
        own.attend(0, [0], [16], 31, query)
    with pytest.raises(BadRequest, match="no such KV block"):
        own.attend(0, [4], [0], 31, query)
    with pytest.raises(BadRequest, match="come in order"):
        own.attend(0, [0, 1], [16, 0], 64, query)


@pytest.mark.parametrize("kv_format", ("bf16", "int8"))
def test_a_range_of_blocks_is_run_in_one_call_with_the_same_bits(kv_format, wider):
    """Parts of a span, one after the other, give what the whole gives."""
    checkpoint = wider("llama").checkpoint
    tokens = prompt(50)
    for by_parts in (False, True):
        weights = load_packed(checkpoint, format="bf16", threads=1)
        decoder = native.NativeDecoder(
            checkpoint.spec, weights, threads=2, kv_format=kv_format, by_parts=by_parts
        )
        paged = Paged(decoder, kv_format)
        whole = paged.run(chunk(tokens, 0, 50, paged.table(50)))
        each = chunk(tokens, 0, 50, paged.table(50))
        hidden = decoder.forward([each], paged.store, blocks=range(1))
        logits = decoder.forward([each], paged.store, hidden, blocks=range(1, decoder.blocks.stop))
        assert hidden.shape == (50, checkpoint.spec.hidden) and torch.equal(logits, whole)
