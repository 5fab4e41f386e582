"""Names for the content of full KV blocks.

The keys and values of a token depend on every token before it, so a block is named by a hash over its
parent's name and its own tokens: equal names mean equal prefixes. The chain starts at a root that names
everything else the content depends on (model, KV format, adapter) and the tenant it must not leave. The
hash is cryptographic, so that nobody can make two prefixes collide, and the same in every process, so
that names can travel between machines. After vLLM's automatic prefix caching.
"""

import struct
from collections.abc import KeysView, Sequence
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
    """Which blocks hold the content of a name.

    Two equal blocks may coexist, so that block tables never have to be rewritten; `match` returns the one
    that was named first.
    """

    def __init__(self) -> None:
        self._block_of_key: dict[bytes, int] = {}
        self._key_of_block: dict[int, bytes] = {}
        self._copies_of_key: dict[bytes, list[int]] = {}

    def __contains__(self, kv_block: int) -> bool:
        return kv_block in self._key_of_block

    def blocks(self) -> KeysView[int]:
        """All blocks that have a name."""
        return self._key_of_block.keys()

    def get(self, key: bytes) -> int | None:
        """The block that holds this content, if there is one."""
        return self._block_of_key.get(key)

    def add(self, kv_block: int, key: bytes) -> None:
        """Name a block that was just filled."""
        known = self._key_of_block.setdefault(kv_block, key)
        assert known == key, f"kv_block {kv_block} was renamed while in use"
        first = self._block_of_key.setdefault(key, kv_block)
        if first != kv_block and kv_block not in self._copies_of_key.setdefault(key, []):
            self._copies_of_key[key].append(kv_block)

    def has_copy(self, kv_block: int) -> bool:
        """Whether another block of the same name exists."""
        return self._key_of_block[kv_block] in self._copies_of_key

    def discard(self, kv_block: int) -> None:
        """Forget a block that is about to be overwritten; a copy of it takes its place."""
        key = self._key_of_block.pop(kv_block)
        copies = self._copies_of_key.get(key)
        if copies is None:
            del self._block_of_key[key]
            return
        if self._block_of_key[key] == kv_block:
            self._block_of_key[key] = copies.pop(0)
        else:
            copies.remove(kv_block)
        if not copies:
            del self._copies_of_key[key]

    def rename(self, kv_block: int, to: int) -> None:
        """The content of a block is in another one from now on, which had no name."""
        key = self._key_of_block.pop(kv_block)
        self._key_of_block[to] = key
        if self._block_of_key[key] == kv_block:
            self._block_of_key[key] = to
        else:
            copies = self._copies_of_key[key]
            copies[copies.index(kv_block)] = to

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
        named = {kv_block: key for key, kv_block in self._block_of_key.items()}
        for key, copies in self._copies_of_key.items():
            assert copies and key in self._block_of_key
            for kv_block in copies:
                assert kv_block not in named, f"kv_block {kv_block} is indexed twice"
                named[kv_block] = key
        assert named == self._key_of_block
