"""Every family that the kernels run, divided over ranks, computes what it computes whole."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import zoo
from test_native import INSIDE, ROUNDED_APART, SAME, Paged, native_decoder, wider  # noqa: F401 - a fixture
from zoo import LENGTHS, chunk, prompt

from plait.engine import native
from plait.engine.kernel_kv import KernelKvStore
from plait.engine.packed import load_packed
from plait.engine.packed_layout import Shard, check_shard
from plait.engine.ranks import vocabularies
from plait.errors import BadSetup
from plait.kernels import native_available

pytestmark = pytest.mark.skipif(not native_available, reason="plait was installed without its CPU kernels")

# One head of keys for all queries, a norm over all heads at once, or experts of one panel's width: see check_shard.
UNDIVIDED = {"llama_tied", "phi3_longrope", "falcon", "olmo2", "olmo3", "qwen3_moe", "qwen3_moe_raw"}


class Divided:
    """A decoder over ranks that are threads here; a rank's part of the KV memory is its own."""

    def __init__(self, checkpoint, ranks, format="bf16", threads=1):
        from plait.kernels import _native

        spec = checkpoint.spec
        self.vocabularies = vocabularies(spec, ranks)
        self.threads = ThreadPoolExecutor(ranks)
        memory_fd = os.memfd_create("plait-test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        sizes = (sum(LENGTHS) * spec.hidden, 1)
        _native.SharedMemoryCollective.prepare(memory_fd, ranks, *sizes)
        self.ranks = []
        for rank in range(ranks):
            shard = Shard(rank=rank, ranks=ranks)
            collective = _native.SharedMemoryCollective(memory_fd, rank, ranks, *sizes, 30.0)
            weights = load_packed(checkpoint, format=format, shard=shard, threads=1)
            decoder = native.NativeDecoder(spec, weights, threads=threads, collective=collective)
            store = KernelKvStore(spec, spec.all_blocks, 64, zoo.BLOCK_TOKENS, "bf16", ranks=ranks)
            self.ranks.append((decoder, store))
        os.close(memory_fd)

    def run(self, *chunks):
        """All logits; the ranks' slices of the vocabulary side by side."""
        parts = list(self.threads.map(lambda rank: rank[0].forward(chunks, rank[1]), self.ranks))
        return torch.cat(parts, dim=1)


@pytest.mark.parametrize("name", [name for name in INSIDE if name not in UNDIVIDED])
def test_every_family_divided_computes_what_it_computes_whole(name, wider):  # noqa: F811 - the fixture
    checkpoint = wider(name).checkpoint
    whole, divided = Paged(native_decoder(checkpoint)), Divided(checkpoint, 2)
    errors = []
    for length in LENGTHS:
        ids = prompt(length)
        one_prompt = chunk(ids, 0, length, whole.table(length))
        expected, found = whole.run(one_prompt), divided.run(one_prompt)
        assert found.shape == expected.shape
        errors.append((found - expected).abs().amax(dim=-1) / expected.std())
    error = torch.cat(errors)
    assert float((error < SAME).double().mean()) > 0.05, error
    # As in test_native.py: what is rounded apart before a router may choose another expert.
    assert float(error.quantile(0.95 if "moe" in name else 1.0)) < ROUNDED_APART, error


@pytest.mark.parametrize("name", sorted(UNDIVIDED))
def test_a_model_that_cannot_be_divided_is_refused_with_the_reason(name, wider):  # noqa: F811 - the fixture
    spec = wider(name).checkpoint.spec
    with pytest.raises(BadSetup, match=r"tensor parallelism over 2 ranks: block 0 .*; use "):
        check_shard(spec, spec.all_blocks, Shard(ranks=2))


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_threads_of_ranks_do_not_change_a_bit(name, wider):  # noqa: F811 - the fixture
    checkpoint = wider(name).checkpoint
    ids = prompt(LENGTHS[-1])
    whole_prompt = chunk(ids, 0, len(ids), list(range(32)))
    one, two = (Divided(checkpoint, 2, threads=threads).run(whole_prompt) for threads in (1, 2))
    assert torch.equal(one, two)
