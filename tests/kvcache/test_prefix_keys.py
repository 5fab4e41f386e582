"""Names of block contents: equal exactly for equal prefixes in one namespace, in every process."""

import os
import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from plait.kvcache import PrefixIndex, PrefixNamespace, chain_keys

NAMESPACE = PrefixNamespace(model="m", kv_format="bf16", adapter="a", salt="s")
tokens = st.lists(st.integers(0, 2), max_size=24)


def keys_of(token_ids: list[int], root_key: bytes = NAMESPACE.root_key, block_tokens: int = 4) -> list[bytes]:
    keys: list[bytes] = []
    chain_keys(keys, root_key, token_ids, len(token_ids) // block_tokens, block_tokens)
    return keys


@given(tokens, tokens)
def test_keys_are_equal_exactly_where_prefixes_are(one: list[int], other: list[int]) -> None:
    pairs = zip(keys_of(one), keys_of(other), strict=False)
    for block, (key, other_key) in enumerate(pairs, start=1):
        assert (key == other_key) == (one[: block * 4] == other[: block * 4])


@given(tokens, st.integers(0, 24))
def test_a_chain_can_be_extended_as_tokens_come(token_ids: list[int], known: int) -> None:
    keys = keys_of(token_ids[:known])
    chain_keys(keys, NAMESPACE.root_key, token_ids, len(token_ids) // 4, 4)
    assert keys == keys_of(token_ids)


def test_every_field_of_a_namespace_separates() -> None:
    others = [
        PrefixNamespace(model="other", kv_format="bf16", adapter="a", salt="s"),
        PrefixNamespace(model="m", kv_format="int8", adapter="a", salt="s"),
        PrefixNamespace(model="m", kv_format="bf16", adapter="other", salt="s"),
        PrefixNamespace(model="m", kv_format="bf16", adapter="a", salt="other"),
        PrefixNamespace(model="m", kv_format="bf16", adapter="as", salt=""),
        PrefixNamespace(model="mb", kv_format="f16", adapter="a", salt="s"),
    ]
    chains = [tuple(keys_of([1] * 8, other.root_key)) for other in [NAMESPACE, *others]]
    assert len({key for chain in chains for key in chain}) == 2 * len(chains)


def test_keys_are_the_same_in_another_process() -> None:
    program = (
        "from plait.kvcache import PrefixNamespace, chain_keys; keys = [];"
        "root = PrefixNamespace(model='m', kv_format='bf16', adapter='a', salt='s').root_key;"
        "chain_keys(keys, root, [5, 6, 7, 2**32 - 1], 1, 4); print(keys[0].hex())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert other.stdout.strip() == keys_of([5, 6, 7, 2**32 - 1])[0].hex(), other.stderr


def test_of_two_equal_blocks_the_one_left_is_found() -> None:
    index = PrefixIndex()
    for kv_block in (3, 5, 7):
        index.add(kv_block, b"key")
        index.add(kv_block, b"key")
        index.check()
    for kv_block, found in ((5, [3]), (3, [7]), (7, [])):
        assert index.match([b"key"])
        index.discard(kv_block)
        assert index.match([b"key"]) == found
        index.check()
