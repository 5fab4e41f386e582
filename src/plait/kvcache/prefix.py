"""Names for the content of full KV blocks.

The keys and values of a token depend on every token before it, so a block is named by a hash over its
parent's name and its own tokens: equal names mean equal prefixes. The chain starts at a root that names
everything else the content depends on (model, KV format, adapter) and the tenant it must not leave. The
hash is cryptographic, so that nobody can make two prefixes collide, and the same in every process, so
that names can travel between machines. After vLLM's automatic prefix caching.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

KEY_BYTES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixNamespace:
    """Whose blocks may be shared: all fields must be equal.

    `model` is the checkpoint's fingerprint (and the rope variant, where it depends on the request);
    `kv_format` how keys and values are stored; `adapter` a fine-tuning; `salt` separates tenants.
    """

    model: str
    kv_format: str
    adapter: str = ""
    salt: str = ""

    @property
    def root_key(self) -> bytes:
        """The key that the chains of this namespace start from."""
        digest = blake2b(digest_size=KEY_BYTES, person=b"plait-prefix")
        for field in (self.model, self.kv_format, self.adapter, self.salt):
            encoded = field.encode()
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
        return digest.digest()


def chain_keys(
    keys: list[bytes], root_key: bytes, token_ids: Sequence[int], blocks: int, block_tokens: int
) -> None:
    """Extend `keys`, the names of the first full blocks of `token_ids`, until it names `blocks` of them."""
    pack = struct.Struct(f"<{block_tokens}I").pack
    parent = keys[-1] if keys else root_key
    for start in range(len(keys) * block_tokens, blocks * block_tokens, block_tokens):
        content = pack(*token_ids[start : start + block_tokens])
        parent = blake2b(parent + content, digest_size=KEY_BYTES).digest()
        keys.append(parent)


class PrefixIndex:
    """Which block holds the content of a name; a block has at most one name and a name one block."""

    def __init__(self) -> None:
        self._block_of_key: dict[bytes, int] = {}
        self._key_of_block: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._block_of_key)

    def __contains__(self, kv_block: int) -> bool:
        return kv_block in self._key_of_block

    def add(self, kv_block: int, key: bytes) -> None:
        """Name a block that was just filled.

        If another block has that name already, this one stays unnamed: two equal blocks may coexist,
        so that block tables never have to be rewritten.
        """
        assert self._key_of_block.get(kv_block, key) == key, f"kv_block {kv_block} was renamed while in use"
        if key not in self._block_of_key:
            self._block_of_key[key] = kv_block
            self._key_of_block[kv_block] = key

    def discard(self, kv_block: int) -> None:
        """Forget a block that is about to be overwritten."""
        key = self._key_of_block.pop(kv_block, None)
        if key is not None:
            del self._block_of_key[key]

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """Blocks that hold the longest indexed prefix of a chain."""
        kv_blocks: list[int] = []
        block_of_key = self._block_of_key
        for key in keys:
            kv_block = block_of_key.get(key)
            if kv_block is None:
                break
            kv_blocks.append(kv_block)
        return kv_blocks

    def check(self) -> None:
        """Assert that both directions agree."""
        assert {block: key for key, block in self._block_of_key.items()} == self._key_of_block
        assert len(self._block_of_key) == len(self._key_of_block)
