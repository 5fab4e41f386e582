"""KV memory: one extent per KV block, moved as one piece."""

import pytest
import torch
import zoo

from plait.engine.kv_store import KvStore, kv_extent_bytes
from plait.errors import BadSetup


@pytest.fixture(params=["llama", "deepseek_v3"])
def spec(request, tiny_checkpoints):
    return tiny_checkpoints(request.param).checkpoint.spec


def store_of(spec, kv_blocks=8, dtype=torch.float32) -> KvStore:
    store = KvStore(spec, spec.all_blocks, kv_blocks, zoo.BLOCK_TOKENS, dtype, "cpu")
    store.extents.copy_(torch.randn(store.extents.shape))
    return store


def test_an_extent_holds_all_layers_of_a_kv_block_contiguously(spec):
    store = store_of(spec)
    assert store.extents.shape[0] == 8 and store.extents.is_contiguous()
    assert store.extent_bytes == kv_extent_bytes(spec, spec.all_blocks, zoo.BLOCK_TOKENS, torch.float32)
    for block in spec.all_blocks:
        layer = store.layer(block)
        assert layer.shape == (8, store.planes, store.heads, zoo.BLOCK_TOKENS, store.dim)
        assert layer.untyped_storage().data_ptr() == store.extents.untyped_storage().data_ptr()
    together = torch.stack([store.layer(block) for block in spec.all_blocks], dim=1)
    assert torch.equal(together.flatten(1), store.extents)


def test_a_span_has_extents_of_its_own_layers_only(spec):
    whole, last = store_of(spec), KvStore(spec, range(1, 2), 8, zoo.BLOCK_TOKENS, torch.float32, "cpu")
    assert last.extent_bytes * len(spec.blocks) == whole.extent_bytes
    with pytest.raises(ValueError, match="0 is not in range"):
        last.layer(0)


def test_a_new_store_is_zero(spec):
    assert not KvStore(spec, spec.all_blocks, 4, zoo.BLOCK_TOKENS, torch.float16, "cpu").extents.any()


def test_copying_moves_whole_kv_blocks_at_once(spec):
    store = store_of(spec)
    before = store.extents.clone()
    store.copy_blocks([(0, 3), (1, 5), (0, 7)])
    store.copy_blocks([])
    before[3], before[5], before[7] = before[0], before[1], before[0]
    assert torch.equal(store.extents, before)


def test_swapping_out_and_in_restores_every_bit(spec):
    store, host = store_of(spec, dtype=torch.bfloat16), store_of(spec, kv_blocks=4, dtype=torch.bfloat16)
    before = store.extents.clone()
    store.swap_out([(6, 0), (2, 3)], host)
    assert torch.equal(host.extents[[0, 3]], before[[6, 2]])
    store.extents[[2, 6]] = 0
    store.swap_in([(0, 1), (3, 4)], host)
    assert torch.equal(store.extents[[1, 4]], before[[6, 2]])


def test_kv_blocks_are_read_and_written_as_values(spec):
    store, other = store_of(spec), store_of(spec)
    contents = store.read_blocks([4, 1])
    store.extents.zero_()
    other.write_blocks([0, 7], contents)
    assert torch.equal(other.read_blocks([0, 7]), contents) and contents.any()


def test_a_cache_that_does_not_fit_is_refused(spec):
    with pytest.raises(BadSetup, match="does not fit into the memory of cpu"):
        KvStore(spec, spec.all_blocks, 2**44, zoo.BLOCK_TOKENS, torch.float32, "cpu")
